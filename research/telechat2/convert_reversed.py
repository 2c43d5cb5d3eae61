"""Convert a MindSpore checkpoint of TeleChat2 to torch weights (Hugging Face's names)."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

import argparse  # noqa: E402

from research.telechat2.checkpoint.convert import (  # noqa: E402
    TORCH_FORMATS,  # noqa: E402
    add_options,
    convert_to_torch,  # noqa: E402
    options_of,
)
from research.telechat2.checkpoint.layouts.read import assume_joined_for  # noqa: E402
from research.telechat2.common.cli import run  # noqa: E402


def main() -> None:
    """Parse the arguments, convert, print what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mindspore_path",
        required=True,
        help="a .safetensors or .ckpt file, or a folder such as MindFormers' output/checkpoint",
    )
    parser.add_argument(
        "--torch_path",
        required=True,
        help="the new weights: a folder for safetensors, or a file ending in .safetensors or .bin "
        "(.bin needs torch and the whole model in memory)",
    )
    parser.add_argument(
        "--format",
        choices=TORCH_FORMATS,
        help="TeleChat's names, or a LlamaForCausalLM folder for other tools (default: as it was before)",
    )
    parser.add_argument(
        "--config",
        help="with --format llama: the model's config.json, or the YAML it was trained with "
        "(default: config.json beside the weights)",
    )
    parser.add_argument(
        "--vocab_file_path",
        help="with --format llama: the model's tokenizer.model (default: the tokenizer beside its config)",
    )
    add_options(parser)
    args = parser.parse_args()
    assume_joined_for(args.joined_for)
    files = {"config": args.config, "vocab_file": args.vocab_file_path}
    print(convert_to_torch(args.mindspore_path, args.torch_path, args.format, **files, **options_of(args)))


if __name__ == "__main__":
    run(main)
