"""The path of research/telechat2/run_telechat_predict.py in older instructions."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "run_telechat_predict.py"), run_name="__main__")
