"""The flags that every conversion has."""

import argparse
import re

from research.telechat2.checkpoint.dtypes import WIDTH

JOINED_FOR = "ranks that the rows of the weights are joined for, if nothing beside them records it"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags whose values are the fields of ``Options``."""
    parser.add_argument("--dtype", choices=tuple(WIDTH), help="of the new weights (default: as they are)")
    parser.add_argument(
        "--max_shard_size",
        type=parse_size,
        metavar="SIZE",
        help="of a file in a folder (default: 5GB)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the table of tensors, source and target; write nothing"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the result back and trace every tensor to its source (default)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue a conversion that was stopped, and keep what is done if this one is",
    )


def options_of(args: argparse.Namespace) -> dict:
    """The fields of ``Options`` that parsed arguments give."""
    return {key: getattr(args, key) for key in ("dtype", "max_shard_size", "dry_run", "verify", "resume")}


def parse_size(text: str) -> int:
    """Bytes: a number, or one with a unit such as ``5GB`` (10^9 bytes each) or ``5GiB`` (2^30).

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected a number of bytes, or such as 5GB")
    return size
