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
        raise argparse.ArgumentTypeError(f"expected GB such as 58, got {text!r}") from None


def main() -> None:
    """Read the arguments and print what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config", dest="config_name", required=True, help="YAML: a path, or the name of a shipped one")
    add("--device_num", type=int, help="NPUs that there are; as many as the plan takes by default")
    add("--set", dest="changes", metavar="KEY=VALUE", type=setting, nargs="+", default=[], action="extend",
        help="change settings of the YAML: parallel_config.model_parallel=4")  # fmt: skip
    add("--estimate", dest="estimated", action="store_true",
        help="memory, communication and speed by formulas, in seconds")  # fmt: skip
    add("--search", dest="search_gb", type=gigabytes, metavar="GB",
        help="list the best plans for NPUs with this memory in GB")  # fmt: skip
    add("--plot", dest="picture", type=Path, metavar="PNG",
        help="draw the estimate: memory of each stage, and the schedule")  # fmt: skip
    add("--dry_run", dest="dry", action="store_true",
        help="compile the training step of a rank of every stage, and read it")  # fmt: skip
    add("--rank", type=int, help="with --dry_run: this rank alone")
    add("--output_dir", type=Path, help="with --dry_run: where to write the strategy files of checkpoints")
    add("--json", dest="json_file", type=Path, metavar="FILE", help="write the result as JSON, to a new file")
    given = vars(parser.parse_args())
    print(plan(**given | {"changes": dict(given["changes"])}))


if __name__ == "__main__":
    run(main)
