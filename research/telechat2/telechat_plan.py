"""Check a training plan before a single NPU is rented: its rules at once, its graph by compiling it here."""

import argparse
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.common.cli import run  # noqa: E402
from research.telechat2.config.overrides import parse_value  # noqa: E402
from research.telechat2.plan.command import plan  # noqa: E402


def setting(text: str) -> tuple[str, object]:
    """``a.b=value`` as key and value: an argparse type."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected section.key=value, got {text!r}")
    return key, parse_value(value)


def gigabytes(text: str) -> float:
    """``58`` or ``58GB``: an argparse type."""
    try:
        return float(text.strip().upper().removesuffix("GB"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory in GB; expected such as 58") from None


def main() -> None:
    """Read the arguments and print what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="finetune YAML: a path, or the name of a shipped one")
    parser.add_argument(
        "--device_num", type=int, help="NPUs that there are; as many as the plan takes by default"
    )
    parser.add_argument(
        "--set",
        dest="changes",
        metavar="KEY=VALUE",
        type=setting,
        nargs="+",
        default=[],
        action="extend",
        help="change settings of the YAML: parallel_config.model_parallel=4",
    )
    parser.add_argument(
        "--estimate", action="store_true", help="memory, communication and speed by formulas, in seconds"
    )
    parser.add_argument(
        "--search", type=gigabytes, metavar="GB", help="list the best plans for NPUs with this memory in GB"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the estimate: memory of each stage, and the schedule"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="compile the training step of a rank of every stage, and read it",
    )
    parser.add_argument("--rank", type=int, help="with --dry_run: this rank alone")
    parser.add_argument(
        "--output_dir", type=Path, help="with --dry_run: where to write the strategy files of checkpoints"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result as JSON too, to a new file"
    )
    arguments = parser.parse_args()
    print(
        plan(
            arguments.config,
            dict(arguments.changes),
            device_num=arguments.device_num,
            estimated=arguments.estimate,
            search_gb=arguments.search,
            picture=arguments.plot,
            dry=arguments.dry_run,
            rank=arguments.rank,
            output_dir=arguments.output_dir,
            json_file=arguments.json,
        )
    )


if __name__ == "__main__":
    run(main)
