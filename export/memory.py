"""How much memory a process has taken."""

import sys
from pathlib import Path


def peak_memory_mib() -> float:
    """The largest resident size of this process so far."""
    try:
        # Linux's getrusage begins with what the parent had when it forked; this figure begins with the program.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    except (OSError, IndexError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Kilobytes, but bytes on macOS.
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
