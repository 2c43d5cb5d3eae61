"""Convert torch weights of TeleChat2 (a Hugging Face folder) to a MindSpore checkpoint.

With --qkv_concat or --tensor_parallel to the layouts of parallel inference; a MindSpore checkpoint of any
layout can be given as well then, with --pre_ckpt_path.
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

import argparse  # noqa: E402

from research.telechat2.checkpoint.convert import (  # noqa: E402
    add_options,
    convert_to_mindspore,  # noqa: E402
    options_of,
)
from research.telechat2.checkpoint.convert_layout import convert_layout  # noqa: E402
from research.telechat2.checkpoint.layouts.read import assume_joined_for  # noqa: E402
from research.telechat2.common.cli import run  # noqa: E402
from research.telechat2.config.overrides import boolean  # noqa: E402


def main() -> None:
    """Parse the arguments, convert, print what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--torch_path",
        help="folder with *.safetensors or pytorch_model*.bin, and config.json; of TeleChat or any Llama",
    )
    source.add_argument(
        "--pre_ckpt_path", help="a MindSpore checkpoint instead: file, folder, or rank_* folders"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--mindspore_path",
        help="the new checkpoint: a file ending in .safetensors or .ckpt, or a folder for model.safetensors",
    )
    target.add_argument("--mindspore_ckpt_path", help="another name of --mindspore_path")
    parser.add_argument(
        "--ckpt_format",
        choices=("safetensors", "ckpt"),
        help="default: as --mindspore_path ends, else safetensors; a ckpt needs the whole model in memory",
    )
    parser.add_argument(
        "--qkv_concat",
        type=boolean,
        default=False,
        help="True joins the rows of wq and wk_v, and those of w1 and w3, for parallel inference",
    )
    parser.add_argument(
        "--tensor_parallel",
        type=int,
        metavar="N",
        help="for N ranks: a folder receives rank_0 to rank_<N-1>; a file is whole, its rows stored for N",
    )
    parser.add_argument(
        "--model_name", help="such as telechat_7B: tells the heads of weights without config.json"
    )
    add_options(parser)
    args = parser.parse_args()
    assume_joined_for(args.joined_for)
    source = args.pre_ckpt_path if args.torch_path is None else args.torch_path
    target = args.mindspore_ckpt_path if args.mindspore_path is None else args.mindspore_path
    if args.qkv_concat or args.tensor_parallel is not None or args.pre_ckpt_path is not None:
        if args.ckpt_format:
            parser.error("--ckpt_format only goes with --torch_path alone; --mindspore_path tells by its end")
        done = convert_layout(
            source,
            target,
            qkv_concat=args.qkv_concat,
            tensor_parallel=args.tensor_parallel,
            model_name=args.model_name,
            **options_of(args),
        )
    else:
        if args.model_name is not None:
            parser.error("--model_name only goes with --qkv_concat, --tensor_parallel or --pre_ckpt_path")
        done = convert_to_mindspore(source, target, args.ckpt_format, **options_of(args))
    print(done)


if __name__ == "__main__":
    run(main)
