"""Train or fine-tune a TeleChat2 model with a few arguments; run_mindformer.py takes all of MindFormers'."""

import argparse
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.common.cli import run as run_command  # noqa: E402
from research.telechat2.config.preflight import TRAINING  # noqa: E402
from research.telechat2.run.arguments import FEW, add_arguments, overrides_of  # noqa: E402
from research.telechat2.run.task import VERBOSE, run  # noqa: E402


def main() -> None:
    """Read the arguments and carry out the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    # text_generation is what the model is trained for; the older command named it, so it is taken
    parser.add_argument("--task", choices=["text_generation"], help=argparse.SUPPRESS)
    parser.add_argument("--config", required=True, help="finetune YAML: a path, or the name of a shipped one")
    parser.add_argument("--verbose", action="store_true", help=VERBOSE)
    add_arguments(parser, FEW)
    arguments = parser.parse_args()
    if arguments.run_mode not in (None, *TRAINING):
        parser.error(f"--run_mode is {arguments.run_mode}; expected {' or '.join(TRAINING)}")
    run(arguments.config, overrides_of(arguments), verbose=arguments.verbose)


if __name__ == "__main__":
    run_command(main)
