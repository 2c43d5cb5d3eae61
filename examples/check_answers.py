"""Ask a fine-tuned model everything it was trained on, and count the answers it gives word for word.

    python examples/check_answers.py --yaml_file predict_telechat_tiny.yaml \\
        --vocab_file_path tokenizer.model --checkpoint_path model.safetensors --input examples/dialogues.jsonl

Each answer of a conversation is asked for with the true conversation before it as prompt; it counts if every
token up to and including ``<_end>`` is the one that was trained.
"""

import argparse
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.common.cli import quiet_libraries, run  # noqa: E402
from research.telechat2.common.errors import UsageError  # noqa: E402
from research.telechat2.config.yaml_files import resolve_config  # noqa: E402

BATCH_SIZE = 20


class Question(NamedTuple):
    """Ids that ask, ids of the trained answer, and whether it is the last of conversation ``number``."""

    prompt: list[int]
    answer: list[int]
    number: int
    final: bool


def read_questions(path: Path, tokenizer) -> list[Question]:
    """Every trained answer of a training file, with what stands before it."""
    from research.telechat2.data.formats import naming, parse_line, read_lines
    from research.telechat2.text.chat import encode

    questions = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        with naming(path, number):
            ids, mask = encode(parse_line(line).render(), tokenizer.vocabulary)
        edges = [i for i, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
        answers = list(zip(edges[::2], edges[1::2], strict=True))
        questions += [
            Question(ids[:start], ids[start:end], number, end == answers[-1][1]) for start, end in answers
        ]
    return questions


def ask_all(predictor, questions: list[Question]) -> list[list[int]]:
    """Answers as ids, in the order of ``questions``; similar lengths are asked together."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    answers = [[]] * len(questions)
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        for i, answer in zip(batch, predictor.generate([questions[i].prompt for i in batch]), strict=True):
            answers[i] = answer.ids
        print(f"\rasked {start + len(batch)} of {len(questions)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return answers


def report(predictor, questions: list[Question], answers: list[list[int]]) -> int:
    """Print counts and every deviating answer; return how many conversations end word for word as trained."""
    decode = predictor.tokenizer.decode
    right = [q.answer == answer for q, answer in zip(questions, answers, strict=True)]
    for question, answer, good in zip(questions, answers, right, strict=True):
        if not good:
            print(f"line {question.number}: trained {decode(question.answer)!r}, answered {decode(answer)!r}")
    final = [good for q, good in zip(questions, right, strict=True) if q.final]
    print(
        f"{sum(final)} of {len(final)} conversations end with the trained answer word for word "
        f"({sum(right)} of {len(right)} answers, those inside conversations included)"
    )
    return sum(final)


def main() -> None:
    """Ask, count, and fail where too few answers are right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--yaml_file", required=True)
    parser.add_argument("--vocab_file_path", required=True)
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--input", required=True, type=Path, help="the training conversations, .jsonl")
    parser.add_argument("--at_least", type=int, default=0, help="exit with 1 below this many conversations")
    args = parser.parse_args()
    quiet_libraries()
    from research.telechat2.infer.loading import load_predictor

    predictor = load_predictor(
        resolve_config(args.yaml_file, Path.cwd()),
        args.vocab_file_path,
        args.checkpoint_path,
        batch_size=BATCH_SIZE,
        generation={"max_new_tokens": 256, "do_sample": False, "repetition_penalty": 1.0},
    )
    questions = read_questions(args.input, predictor.tokenizer)
    right = report(predictor, questions, ask_all(predictor, questions))
    if right < args.at_least:
        raise UsageError(
            f"only {right} conversations end as trained, expected at least {args.at_least}: "
            "train for more epochs, or look at the loss curve."
        )


if __name__ == "__main__":
    run(main)
