"""Questions on a command line, in a file, or in a conversation; infer/loading.py answers them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import nullcontext
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.config.sampling import DRAWN_ONLY, NEUTRAL
from research.telechat2.data import formats, sources
from research.telechat2.data.conversions import Conversation
from research.telechat2.data.formats import naming, parse_question
from research.telechat2.generation.answer import STOPPED, Answer, speed
from research.telechat2.infer.predictor import Predictor
from research.telechat2.infer.sources import numbered
from research.telechat2.infer.terminal import COMMANDS, HELP, Spinner, Terminal, note
from research.telechat2.text.chat import DEFAULT_SYSTEM
from research.telechat2.text.messages import (
    BYTE_ORDER_MARK,
    is_blank,
    with_text_content,
    without_byte_order_marks,
)


def question(text: str, system: str | None = None) -> Conversation:
    """A conversation of one question, after a system message if there is one, which may be empty."""
    message = {"role": "user", "content": without_byte_order_marks(text)}
    return Conversation([*_system(system), message], None, "chat")


def _system(system: str | None) -> list[dict]:
    return [] if system is None else [{"role": "system", "content": without_byte_order_marks(system)}]


def read_questions(
    path: str | Path, system: str | None = None, ignored: Set[str] = frozenset()
) -> list[Conversation]:
    """Conversations that wait for an answer: a question on each line of a text, or data as for training.

    Data are what ``telechat_preprocess.py`` reads, a directory of it, or a file whose first line is a
    conversation in JSON. The last answer of a conversation is cut off, and need not be there; fields that
    give it, and metadata, are left out and counted on standard error. ``system`` is put before those without
    one. ``ignored``: fields that count as absent.

    Raises:
        UsageError: no question at all, or a line that is no conversation (file and line are named).
    """
    is_data = _is_data(Path(path))
    if not is_data and (is_data := formats.holds_data(path)):
        note(f"{path}: read as data, since its first line is a conversation in JSON")
    if is_data:
        files = [source.path for source in sources.find([path])]
        questions = [asked for file in files for asked in _read_data(file, system, ignored)]
    else:
        questions = list(_read_text(path, system))
    if left_out := Counter(name for asked in questions for name in asked.unused):
        listed = ", ".join(f"{count} {name}" for name, count in left_out.items())
        note(f"{path}: fields that are not used: {listed}")
    if not questions:
        raise UsageError(f"{path} holds no question.")
    return questions


def _is_data(path: Path) -> bool:
    return path.is_dir() or sources.DATA_FILE.search(path.name) is not None


def _read_text(path: str | Path, system: str | None) -> Iterator[Conversation]:
    for number, line in formats.read_lines(path, is_data=False):
        if not is_blank(line):
            with naming(path, number):
                yield question(line.rstrip("\r\n"), system)


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
    """What ``--input_txt`` names: a text file is one question, data are as for ``read_questions``."""
    if _is_data(Path(path)):
        return read_questions(path, system, ignored)
    lines = (line.removesuffix("\n") for _, line in formats.read_lines(path, is_data=False))
    text = "\n".join(line.removesuffix("\r") for line in lines).strip()  # "\r\n" is how Windows ends lines
    if is_blank(text):
        raise UsageError(f"{path} holds no question.")
    return [question(text, system)]


def answer_all(predictor: Predictor, questions: list[Conversation], batch_size: int) -> None:
    """Answer conversations in batches, and print each with its question.

    If one cannot be asked, a UsageError gives its number, and nothing is answered.
    """
    prompts = []
    for number, asked in enumerate(questions, 1):
        with numbered("question", number, len(questions)):
            prompts.append(predictor.prompt_ids(asked))
            predictor.check(prompts[-1:])
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    for batch in batches:
        predictor.check(prompts[batch])
    for batch in batches:
        answers = predictor.generate(prompts[batch])
        for asked, answer in zip(questions[batch], answers, strict=True):
            print(f"{asked.messages[-1]['content']}\n{answer.text}\n", flush=True)
            if answer.cut or len(answers) == 1:
                note(answer)
        if len(answers) > 1:
            tokens = sum(len(answer.ids) for answer in answers)
            seconds, first = answers[0].seconds, answers[0].seconds_to_first_token  # of all rows
            figures = f"{len(answers)} answers, {tokens} tokens, {seconds:.2f} s"
            later = speed(tokens - len(answers), seconds - first)
            note(f"[{figures}, the first tokens after {first:.2f} s{later}]")


def name_settings_without_effect(predictor: Predictor) -> None:
    """Print to standard error what was asked for and changes nothing, since no token is drawn."""
    given = predictor.generation
    idle = [f"--{name} {given[name]}" for name in DRAWN_ONLY if given.get(name) not in (None, NEUTRAL[name])]
    if idle and not given.get("do_sample", predictor.model.config.do_sample):
        note(f"{', '.join(idle)}: without effect, as do_sample is False; --do_sample True draws tokens.")


def name_system_texts(predictor: Predictor, conversations: list[Conversation], given: str | None) -> None:
    """Print to standard error which system text conversations are asked with, and where it comes from.

    ``given``: that of --system, "" for an empty one, None for none.
    """
    if predictor.prompt_format != "chat":
        return  # the others have none
    firsts = [with_text_content(asked.messages[0], 1) for asked in conversations]
    texts = [first["content"] if first["role"] == "system" else None for first in firsts]
    own = 'the chat format\'s own; --system gives another, and --system "" an empty one'
    for text, shown, source in ((None, DEFAULT_SYSTEM, own), (given, given, "as --system says")):
        if shown is not None and (count := texts.count(text)):
            share = "" if count == len(texts) else f" of {count} of {len(texts)} questions"
            note(f"system text{share}: {shown or '(empty)'} ({source})")
    if given is not None and given not in texts:
        note("--system is not used: every conversation has a system text of its own")


def chat(
    predictor: Predictor, system: str | None, lines: Iterable[str], terminal: Terminal | None = None
) -> int:
    """Answer every line of ``lines`` in one conversation, streaming; /new starts another, /exit ends it.

    A line that cannot be asked (it is too long, or no valid Unicode) is named on standard error and leaves
    the conversation as it was. ``terminal``: whose Ctrl-C stops an answer; what was shown of it stays in the
    conversation. Returns the number of lines that were not asked.
    """
    start = _system(system)
    begin = Conversation([*start, {"role": "user", "content": "?"}], None, "chat")
    predictor.prompt_ids(begin)
    name_system_texts(predictor, [begin], system)
    messages, refused, label = list(start), 0, "compiling, which takes longest for the first answer"
    for line in lines:
        text = line.strip().strip(BYTE_ORDER_MARK).strip()  # joined files have them between
        command = COMMANDS.get(text.lower()) if text.startswith("/") else None
        if command == "/exit":
            break
        if command == "/new":
            messages = list(start)
        elif command == "/help":
            note(HELP)
        if command or is_blank(text):
            continue
        with terminal.answering() if terminal else nullcontext() as stop:
            try:
                text = without_byte_order_marks(text)
                asked = _that_fit(predictor, [*messages, {"role": "user", "content": text}], keep=len(start))
            except UsageError as error:
                note(f"(not asked: {error})")
                refused += 1
                continue
            answer = _streamed(predictor, asked, stop, label)
        print(flush=True)
        note(answer)
        if answer.text or answer.cut != STOPPED:
            messages = [*asked, {"role": "assistant", "content": answer.text}]
        else:
            note("(stopped before its first character: the question is taken back)")
        label = ""
    return refused


def _streamed(predictor: Predictor, messages: list[dict], stop: Callable | None, label: str) -> Answer:
    """Ask, and print the answer as it grows; ``label``: what takes long, "" if nothing does."""
    spinner, pieces = Spinner(), 0

    def show(text: str) -> None:
        nonlocal pieces
        spinner.stop()
        print(text, end="", flush=True)
        pieces += 1
        if label and pieces == 1:
            spinner.start()  # the second token needs a graph of its own

    spinner.start(label or "reading the question")
    try:
        return predictor.ask(messages, on_text=show, **({"stop": stop} if stop else {}))
    finally:
        spinner.stop()


def _that_fit(predictor: Predictor, messages: list[dict], keep: int) -> list[dict]:
    """``messages`` without the oldest questions and answers that leave no room for another answer."""
    for forgotten in range(0, len(messages) - keep, 2):
        kept = messages[:keep] + messages[keep + forgotten :]
        prompt = predictor.prompt_ids(Conversation(kept, None, predictor.prompt_format))
        if predictor.fits(prompt):
            break
    predictor.check([prompt])
    if forgotten:
        note(f"(the conversation grew too long: its oldest {forgotten} messages are forgotten)")
    return kept
