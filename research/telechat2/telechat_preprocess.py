"""Command: turn a jsonl file of conversations into MindRecord training data."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere

import argparse  # noqa: E402

from research.telechat2.telechat_cli import run  # noqa: E402


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(
        description="Turn conversations into MindRecord training data. A line of the jsonl file holds input "
        "and output (plain prompt format), or messages, or system and dialog (chat template)."
    )
    parser.add_argument(
        "--input_dataset_file", required=True, help="jsonl file, or a directory of .jsonl files"
    )
    parser.add_argument("--vocab_file_path", required=True, help="the model's tokenizer.model")
    parser.add_argument(
        "--max_length", type=int, default=8192, help="the model's seq_length; records are one longer"
    )
    parser.add_argument(
        "--output_path",
        required=True,
        help="a .mindrecord file, or a directory that receives dataset.mindrecord",
    )
    parser.add_argument("--seed", type=int, default=2024, help="seed of the order of conversations")
    args = parser.parse_args()

    from research.telechat2.data.preparing import prepare, report

    result = prepare(
        args.input_dataset_file, args.vocab_file_path, args.output_path, args.max_length, args.seed
    )
    print(report(result))


if __name__ == "__main__":
    run(main)
