"""Questions on a command line, in a file, or in a conversation; telechat_predict_utils.py answers them."""

import sys
from collections.abc import Iterable
from pathlib import Path

from research.telechat2.data.formats import Conversation, naming, parse_line, read_lines
from research.telechat2.telechat_predict_utils import Answer, Predictor


def question(text: str, system: str | None = None) -> Conversation:
    """A conversation of one question, after a system message if there is one."""
    return Conversation([*_system(system), {"role": "user", "content": text}], None, "chat")


def _system(system: str | None) -> list[dict]:
    return [{"role": "system", "content": system}] if system else []


def read_questions(path: str | Path, system: str | None = None) -> list[Conversation]:
    """Conversations that wait for an answer: a question on each line, or ``.jsonl`` lines of training data.

    Of a jsonl conversation the last answer is cut off. ``system`` is put before those without one.

    Raises:
        ValueError: an empty file, or a line that is no conversation (file and line are named).
    """
    questions = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if Path(path).suffix != ".jsonl":
            questions.append(question(line.rstrip("\r\n"), system))
            continue
        with naming(path, number):
            asked = parse_line(line)
            asked.render()  # checks the messages
        messages = asked.messages
        if messages[-1]["role"] in ("assistant", "bot"):
            messages = messages[:-1]
        if messages and messages[0]["role"] != "system":
            messages = [*_system(system), *messages]
        questions.append(asked._replace(messages=messages))
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions


def read_prompts(path: str | Path, system: str | None = None) -> list[Conversation]:
    """What ``--input_txt`` names: a text file is one question, a ``.jsonl`` file one on each line.

    Raises:
        ValueError: an empty file, one that is not UTF-8, or a line that is no conversation.
    """
    if Path(path).suffix == ".jsonl":
        return read_questions(path, system)
    text = "".join(line for _, line in read_lines(path)).strip()
    if not text:
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
        text = line.strip()
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
