"""Show conversations as a model is trained on them.

python research/telechat2/telechat_chat.py show --vocab_file_path tokenizer.model dialogues.jsonl --line 3
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

import argparse
import os
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from research.telechat2.text.vocabulary import Vocabulary

from research.telechat2.common.errors import UsageError
from research.telechat2.text import prompt_format as prompt_formats
from research.telechat2.text.chat import TRAIN_ON, encode


def coloured(ids: list[int], mask: list[int], vocabulary: "Vocabulary", colour: bool) -> str:
    """Return the text of ``ids``; trained tokens green (in ⟦⟧ without colour), special ones bold."""
    text = ""
    for trained, run in groupby(vocabulary.spans(ids, mask), key=lambda span: span.trained):
        if not colour:
            plain = "".join(span.text for span in run)
            text += f"⟦{plain}⟧" if trained else plain
            continue
        for span in run:
            codes = ["32"] * trained + ["1"] * span.special
            text += f"\033[{';'.join(codes)}m{span.text}\033[0m" if codes and span.text else span.text
    return text


def _show(args) -> None:
    from research.telechat2.data import formats, job, sources

    vocabulary = job.vocabulary_of_data(args.vocab_file_path)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shown = 0
    files = [source.path for source in sources.find([args.file])]
    for file in files:
        for number, line in formats.read_lines(file):
            if args.line not in (None, number) or not line.strip():
                continue
            shown += 1
            of = f" of {file}" if len(files) > 1 else ""
            with formats.naming(file, number):
                try:
                    _, parsed = formats.parse(line, job.ignored_fields(args.ignore_fields))
                except formats.UnusableLine as error:
                    if error.reason != formats.WEIGHT_0:
                        raise
                    print(f"--- line {number}{of}: {error.reason}")
                    continue
                prompt_format = args.prompt_format or parsed.prompt_format
                ids, mask = encode(parsed.render(prompt_format, args.train_on), vocabulary)
            print(f"--- line {number}{of}: {prompt_format} format, {len(ids)} tokens, {sum(mask)} trained")
            print(coloured(ids, mask, vocabulary, colour))
    if not shown:
        raise UsageError(
            f"{args.file} has no line {args.line} with a conversation"
            if args.line is not None
            else f"{args.file} is empty"
        )


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description="The renderer of conversations.")
    show = parser.add_subparsers(dest="command", required=True).add_parser(
        "show", help="print conversations with their trained tokens green (in ⟦⟧ where there is no colour)"
    )
    show.add_argument("file", help="data: what telechat_preprocess.py takes as --input_dataset_file")
    show.add_argument("--vocab_file_path", required=True, help="the model's tokenizer.model")
    show.add_argument(
        "--prompt_format", choices=prompt_formats.PROMPT_FORMATS, help="default: the data's own"
    )
    show.add_argument(
        "--train_on", choices=TRAIN_ON, default="answers", help="what is trained (default: %(default)s)"
    )
    show.add_argument("--ignore_fields", metavar="A,B", help="fields to leave out")
    show.add_argument("--line", type=int, help="show this line only (from 1); default: all")
    _show(parser.parse_args())


if __name__ == "__main__":
    from research.telechat2.common.cli import run

    run(main)
