"""Merge a checkpoint that a cluster saved slice by slice, or cut it anew for another cluster."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

import argparse  # noqa: E402

from research.telechat2.checkpoint.cluster.reshard import transform  # noqa: E402
from research.telechat2.common.cli import quiet_libraries, run  # noqa: E402


def main() -> None:
    """Parse the arguments, transform, print what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--src_ckpt_strategy",
        help="strategies of the run that saved it, output/strategy or one file; left out: it is whole",
    )
    parser.add_argument(
        "--dst_ckpt_strategy", help="strategies of the cluster that is to load it; left out: one device"
    )
    parser.add_argument(
        "--src_ckpt_dir", required=True, help="what was saved: output/checkpoint, or one of its iterations"
    )
    parser.add_argument("--dst_ckpt_dir", required=True, help="receives rank_0/PREFIX0.safetensors, …")
    parser.add_argument("--prefix", default="checkpoint_", help="of the new files (default: checkpoint_)")
    args = parser.parse_args()
    quiet_libraries()
    print(transform(args.src_ckpt_dir, args.dst_ckpt_dir, args.prefix, args.src_ckpt_strategy,
                    args.dst_ckpt_strategy))  # fmt: skip


if __name__ == "__main__":
    run(main)
