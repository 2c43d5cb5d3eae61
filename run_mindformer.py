"""MindFormers' entry for every task, with its own arguments, working from this checkout.

Any further ``--section.key value`` overrides that key of the YAML.
"""

import argparse
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent)  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.checkpoint.convert import JOINED_FOR  # noqa: E402
from research.telechat2.checkpoint.layouts.read import assume_joined_for  # noqa: E402
from research.telechat2.common.cli import run as run_command  # noqa: E402
from research.telechat2.config.overrides import parse_options, parse_overrides  # noqa: E402
from research.telechat2.config.yaml_files import join_overrides  # noqa: E402
from research.telechat2.run.arguments import add_arguments, overrides_of, renamed  # noqa: E402
from research.telechat2.run.task import VERBOSE, run  # noqa: E402


def main() -> None:
    """Read the arguments and carry out the task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML: a path, or the name of a shipped one")
    parser.add_argument(
        "--register_path", help="directory of the model's code; research/telechat2 by default"
    )
    parser.add_argument("--joined_for", type=int, metavar="N", help=JOINED_FOR)
    parser.add_argument("--options", nargs="+", default=[], help="key=value …, the older form of --key value")
    parser.add_argument("--verbose", action="store_true", help=VERBOSE)
    add_arguments(parser)
    arguments, further = parser.parse_known_args()
    overrides = join_overrides(
        overrides_of(arguments),
        renamed(parse_options(arguments.options)),
        parse_overrides(further),
    )
    assume_joined_for(arguments.joined_for)
    run(arguments.config, overrides, arguments.register_path, arguments.verbose)


if __name__ == "__main__":
    run_command(main)
