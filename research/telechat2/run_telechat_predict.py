"""Ask a TeleChat2 model; ``--help`` says how."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.common.cli import run  # noqa: E402
from research.telechat2.infer.command import main  # noqa: E402

if __name__ == "__main__":
    run(main)
