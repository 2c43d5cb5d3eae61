"""Questions on a command line, in a file, or in a conversation; telechat_predict_utils.py answers them."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from research.telechat2.data import formats, sources
from research.telechat2.data.formats import Conversation, naming, parse_question
from research.telechat2.telechat_predict_utils import Answer, Predictor
from research.telechat2.text.messages import is_blank


def question(text: str, system: str | None = None) -> Conversation:
    """A conversation of one question, after a system message if there is one."""
    return Conversation([*_system(system), {"role": "user", "content": text}], None, "chat")


def _system(system: str | None) -> list[dict]:
    return [] if system is None else [{"role": "system", "content": system}]


def read_questions(
    path: str | Path, system: str | None = None, ignored: Set[str] = frozenset()
) -> list[Conversation]:
    """Conversations that wait for an answer: a question on each line of a text, or data as for training.

    Data are what ``telechat_preprocess.py`` reads: ``.jsonl``, ``.ndjson`` and ``.json``, packed or not, or a
    directory of them. The last answer of a conversation is cut off, and need not be there; fields of a test
    set that give it, and metadata, are left out, and counted on standard error. ``system`` is put before
    those without one. ``ignored``: fields that count as absent.

    Raises:
        ValueError: no question at all, or a line that is no conversation (file and line are named).
    """
    if not _is_data(Path(path)):
        lines = [line for _, line in formats.read_text_lines(path)]
        questions = [question(line.rstrip("\r\n"), system) for line in lines if not is_blank(line)]
    else:
        files = [source.path for source in sources.find([path])]
        questions = [asked for file in files for asked in _read_data(file, system, ignored)]
        if left_out := Counter(name for asked in questions for name in asked.unused):
            listed = ", ".join(f"{count} {name}" for name, count in left_out.items())
            print(f"{path}: fields that are not used: {listed}", file=sys.stderr)
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions


def _is_data(path: Path) -> bool:
    return path.is_dir() or sources.DATA_FILE.search(path.name) is not None


def _read_data(file: Path, system: str | None, ignored: Set[str]) -> Iterator[Conversation]:
    for number, line in formats.read_lines(file):
        if is_blank(line):
            continue
        with naming(file, number):
            asked = parse_question(line, ignored)
        start = _system(system) if asked.messages[0]["role"] != "system" else []
        yield asked._replace(messages=[*start, *asked.messages])


def read_prompts(
    path: str | Path, system: str | None = None, ignored: Set[str] = frozenset()
) -> list[Conversation]:
    """What ``--input_txt`` names: a text file is one question, data are as for ``read_questions``.

    Raises:
        ValueError: an empty file, one that is not UTF-8, or a line that is no conversation.
    """
    if _is_data(Path(path)):
        return read_questions(path, system, ignored)
    text = "".join(line for _, line in formats.read_text_lines(path)).strip()
    if is_blank(text):
        raise ValueError(f"{path} holds no question.")
    return [question(text, system)]


def answer_all(predictor: Predictor, questions: list[Conversation], batch_size: int) -> None:
    """Answer conversations in batches, and print each with its question.

    Raises:
        ValueError: one cannot be asked (its number is given); nothing is answered then.
    """
    prompts = []
    for number, asked in enumerate(questions, 1):
        try:
            prompts.append(predictor.prompt_ids(asked))
            predictor.check(prompts[-1:])
        except ValueError as error:
            raise ValueError(f"question {number} of {len(questions)}: {error}") from error
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    for batch in batches:
        predictor.check(prompts[batch])
    for batch in batches:
        answers = predictor.generate(prompts[batch])
        for asked, answer in zip(questions[batch], answers, strict=True):
            print(f"{asked.messages[-1]['content']}\n{answer.text}\n", flush=True)
            if answer.cut or len(answers) == 1:
                print(answer, file=sys.stderr)
        if len(answers) > 1:
            print(_figures(answers), file=sys.stderr)


def _figures(answers: list[Answer]) -> str:
    """A line of figures of a batch for a person; its rows share their steps."""
    tokens, first = sum(len(answer.ids) for answer in answers), answers[0].seconds_to_first_token
    later = answers[0].seconds - first
    speed = f", {(tokens - len(answers)) / later:.1f} tokens/s" if later > 0 and tokens > len(answers) else ""
    return (
        f"[{len(answers)} answers, {tokens} tokens, {answers[0].seconds:.2f} s, the first tokens after "
        f"{first:.2f} s{speed}]"
    )


def chat(predictor: Predictor, system: str | None, lines: Iterable[str]) -> int:
    """Answer every line of ``lines`` in one conversation, streaming; ``/new`` starts another.

    A line that cannot be asked (it is too long, or no valid Unicode) is named on standard error and leaves
    the conversation as it was. Returns the number of such lines.

    Raises:
        ValueError: the prompt format has no place for ``system``.
    """
    start = _system(system)
    predictor.prompt_ids(Conversation([*start, {"role": "user", "content": "?"}], None, "chat"))
    messages, refused = list(start), 0
    for line in lines:
        text = line.strip().removeprefix("\ufeff").strip()  # joined files have byte order marks between them
        if text == "/new":
            messages = list(start)
        if not text or text == "/new":
            continue
        try:
            asked = _that_fit(predictor, [*messages, {"role": "user", "content": text}], keep=len(start))
            answer = predictor.ask(asked, on_text=lambda text: print(text, end="", flush=True))
        except ValueError as error:
            print(f"(not asked: {error})", file=sys.stderr)
            refused += 1
            continue
        print(flush=True)
        print(answer, file=sys.stderr)
        messages = [*asked, {"role": "assistant", "content": answer.text}]
    return refused


def _that_fit(predictor: Predictor, messages: list[dict], keep: int) -> list[dict]:
    """``messages`` without as many of the oldest questions and answers as leave room for an answer.

    ValueError if even the last question alone leaves none.
    """
    for forgotten in range(0, len(messages) - keep, 2):
        kept = messages[:keep] + messages[keep + forgotten :]
        prompt = predictor.prompt_ids(Conversation(kept, None, predictor.prompt_format))
        if predictor.fits(prompt):
            break
    predictor.check([prompt])
    if forgotten:
        print(
            f"(the conversation grew too long: its oldest {forgotten} messages are forgotten)",
            file=sys.stderr,
        )
    return kept
