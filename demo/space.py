"""The page as a Hugging Face Space: the ``app_file`` in the README's front matter.

A Space runs ``python demo/space.py``, which puts this folder on the path instead of the repository, and expects the page
on port 7860 of every address (https://huggingface.co/docs/hub/spaces-config-reference).
"""

import os
import sys
from pathlib import Path

# In its place, not before it: the names of our own files must not hide those of other packages.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from demo.__main__ import main  # noqa: E402 -- found by the line above

if __name__ == "__main__":
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    sys.exit(main(["--host", "0.0.0.0", "--port", port, *sys.argv[1:]]))  # noqa: S104 -- a Space's own container
