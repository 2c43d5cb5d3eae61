"""Command: turn jsonl files of conversations and texts into MindRecord training data."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

import argparse  # noqa: E402

from research.telechat2.common.cli import run  # noqa: E402


def main() -> None:
    """Parse the arguments and run."""
    from research.telechat2.data import engines, job
    from research.telechat2.data.report_words import LANGUAGES
    from research.telechat2.text.chat import TRAIN_ON

    parser = argparse.ArgumentParser(
        description="Turn conversations and texts into MindRecord training data. What a line of jsonl holds "
        "is told by its keys: input and output (plain prompt format); messages, system and dialog, "
        "conversations, or instruction and output (chat template); text, or data (pretraining)."
    )
    defaults = job.Options()
    parser.add_argument(
        "--input_dataset_file",
        required=True,
        nargs="+",
        help="jsonl files or JSON arrays (.jsonl, .ndjson, .json, also packed: .gz, .zst), directories of "
        "them, patterns in quotes, or a .json file that maps such paths to weights",
    )
    parser.add_argument("--vocab_file_path", required=True, help="the model's tokenizer.model")
    parser.add_argument(
        "--max_length",
        type=int,
        default=defaults.max_length,
        help="the model's seq_length (default: %(default)s); records are one longer",
    )
    parser.add_argument(
        "--output_path",
        required=True,
        help="a .mindrecord file, or a directory that receives dataset.mindrecord",
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="seed of the order and of fractional weights"
    )
    parser.add_argument(
        "--train_on",
        choices=TRAIN_ON,
        default=defaults.train_on,
        help="what of a conversation is trained (default: %(default)s); never system text and tool results",
    )
    parser.add_argument(
        "--too_long",
        choices=job.TOO_LONG,
        default=defaults.too_long,
        help="what becomes of a conversation longer than a record (default: %(default)s); truncate cuts at a "
        "turn border",
    )
    parser.add_argument(
        "--bad_lines",
        choices=job.BAD_LINES,
        default=defaults.bad_lines,
        help="whether a line that cannot be used ends the run (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore_fields",
        metavar="A,B",
        default=defaults.ignore_fields,
        help="fields of lines and messages to leave out, though their text is lost (default: none)",
    )
    parser.add_argument(
        "--records_per_file",
        type=int,
        help="write numbered files of so many records (default: one file, numbered ones above 2 GB)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that encode (default: one for each core); the result is the same",
    )
    parser.add_argument(
        "--engine", choices=engines.ENGINES, default="processes", help="ray: encode on a Ray cluster"
    )
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument(
        "--report",
        nargs="?",
        const="en",
        default="",
        choices=LANGUAGES,
        help="also write a page with statistics and samples: .mindrecord.html, in English or Chinese (zh)",
    )
    args = parser.parse_args()

    from research.telechat2.data import html_report, preparing

    options = job.Options(**{name: getattr(args, name) for name in job.Options._fields})
    result = preparing.prepare(
        args.input_dataset_file, args.vocab_file_path, args.output_path, options,
        workers=args.workers, engine=args.engine, resume=args.resume, html_report=args.report,
    )  # fmt: skip
    print(html_report.summary(result))


if __name__ == "__main__":
    run(main)
