"""Where the steps of `tests.gpu.check` find and leave things, on which device, and how they tell what they found."""

import json
import os
from pathlib import Path
from typing import Any

MARK = "RESULT "
"""Before what was found, as JSON, for `tests.gpu.check`."""
WORK = Path(os.environ.get("GPU_CHECK_WORK", "/tmp/gpu/work"))  # noqa: S108 -- a machine for this alone
ROWS = Path(os.environ.get("GPU_STORE", "/tmp/gpu")) / "parts/rows.jsonl"  # noqa: S108 -- the same
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
ADAPTERS = {"v1": Path("demo/adapters/minilm-mrpc").resolve(), "v2": Path("demo/adapters/minilm-mrpc-v2").resolve()}

SHAPES = ("1x16", "1x60", "1x200", "8x60", "32x60", "256x60") if ON_CUDA else ("1x16", "2x30")


def tell(key: str, value: Any) -> None:
    print(MARK + json.dumps([key, value]), flush=True)


def folders(name: str) -> tuple[Path, Path]:
    """Adapter and bundle, once ``engines`` has made them."""
    return ADAPTERS.get(name, WORK / name / "adapter"), WORK / name / "bundle"
