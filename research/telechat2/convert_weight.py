"""Convert torch weights of TeleChat2 (a Hugging Face folder) to a MindSpore checkpoint."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere

import argparse  # noqa: E402

from research.telechat2.checkpoint import convert_to_mindspore  # noqa: E402
from research.telechat2.checkpoint.options import add_options, options_of  # noqa: E402
from research.telechat2.telechat_cli import run  # noqa: E402


def main() -> None:
    """Parse the arguments, convert, print what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--torch_path", required=True, help="folder with *.safetensors or pytorch_model*.bin, and config.json"
    )
    parser.add_argument(
        "--mindspore_path",
        required=True,
        help="the new checkpoint: a file ending in .safetensors or .ckpt, or a folder for model.safetensors",
    )
    parser.add_argument(
        "--ckpt_format",
        choices=("safetensors", "ckpt"),
        help="default: as --mindspore_path ends, else safetensors; a ckpt needs the whole model in memory",
    )
    add_options(parser)
    args = parser.parse_args()
    print(convert_to_mindspore(args.torch_path, args.mindspore_path, args.ckpt_format, **options_of(args)))


if __name__ == "__main__":
    run(main)
