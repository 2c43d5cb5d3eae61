"""Command: turn jsonl files of conversations and texts into MindRecord training data."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

import argparse  # noqa: E402

from research.telechat2.common.cli import run  # noqa: E402

_DESCRIPTION = (
    "Turn conversations and texts into MindRecord training data. The keys of a line tell what "
    "it holds: input and output (plain prompt format); messages, system and dialog, conversations, or "
    "instruction and output (chat template); text, or data (pretraining)."
)
_OPTIONS = {
    "max_length": "the model's seq_length (default: %(default)s); records are one longer",
    "seed": "seed of the order and of fractional weights (default: %(default)s)",
    "train_on": "what of a conversation is trained (default: %(default)s); never system text or tool results",
    "too_long": "what becomes of a conversation longer than a record (default: %(default)s); truncate cuts "
    "at a turn border",
    "bad_lines": "whether a line that cannot be used ends the run (default: %(default)s)",
    "records_per_file": "write numbered files of so many records (default: one file, several above 2 GB)",
    "ignore_fields": "fields of lines and messages to leave out, with commas between them, though their text "
    "is lost (default: none)",
}


def main() -> None:
    """Parse the arguments and run."""
    from research.telechat2.data import engines, html_report, job, preparing
    from research.telechat2.data.report_words import LANGUAGES

    parser = argparse.ArgumentParser(description=_DESCRIPTION)
    add = parser.add_argument
    add(
        "--input_dataset_file",
        required=True,
        nargs="+",
        help="jsonl files or JSON arrays (.jsonl, .ndjson, .json, also packed: .gz, .zst), directories of "
        "them, patterns in quotes, or a .json file that maps such paths to weights",
    )
    add("--vocab_file_path", required=True, help="the model's tokenizer.model")
    add(
        "--output_path",
        required=True,
        help="a .mindrecord file, or a directory that receives dataset.mindrecord",
    )
    for name, default in job.Options._field_defaults.items():
        kind = int if name in job.LEAST else str
        choices = job.CHOICES.get(name)
        add(f"--{name}", type=kind, choices=choices, default=default, help=_OPTIONS[name])
    workers = "processes that encode (default: one for each core); the result is the same"
    add("--workers", type=int, help=workers)
    add("--engine", choices=engines.ENGINES, default="processes", help="ray: encode on a Ray cluster")
    add("--resume", action="store_true", help="continue a run that was stopped")
    page = "also write a page with statistics and samples: .mindrecord.html, in English or Chinese (zh)"
    add("--report", nargs="?", const="en", default="", choices=LANGUAGES, help=page)
    args = parser.parse_args()
    options = job.Options(**{name: getattr(args, name) for name in job.Options._fields})
    result = preparing.prepare(
        args.input_dataset_file, args.vocab_file_path, args.output_path, options,
        workers=args.workers, engine=args.engine, resume=args.resume, report=args.report,
    )  # fmt: skip
    print(html_report.summary(result))


if __name__ == "__main__":
    run(main)
