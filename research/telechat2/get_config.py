"""Write config.json for a MindIE folder made by hand, run in that folder: the README's recipe.

It may be copied into the folder; the plugin must be installed then (pip install). build_mindie_folder.py
makes a whole folder that needs no plugin.
"""

import argparse
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
if here.parts[-2:] == ("research", "telechat2"):
    sys.path[0] = str(here.parents[1])  # run as a file from anywhere

try:
    from research.telechat2.common.cli import quiet_libraries, run
    from research.telechat2.common.errors import UsageError
except ImportError:
    sys.exit("error: the plugin is not installed here; run `pip install .` in its checkout, then this again.")


def main() -> None:
    """Finish the folder, and say what was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", type=Path, default=Path("."), help="the folder; by default this one")
    folder = parser.parse_args().model_path.absolute()
    if not folder.is_dir():
        raise UsageError(f"--model_path {folder} is no directory.")
    quiet_libraries()
    from research.telechat2.serve.mindie.recipe import finish_folder

    print(finish_folder(folder), end="")


if __name__ == "__main__":
    run(main)
