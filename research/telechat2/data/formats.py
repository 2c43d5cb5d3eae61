"""Training data formats: one jsonl line -> one conversation, or one text for pretraining.

Told apart by their keys, in this order:
    messages [, tools]                     OpenAI's; chat template
    dialog [, system]                      TeleChat2's own, tools pre-rendered in the contents; chat template
    conversations [, system, tools]        ShareGPT's; chat template
    instruction, output [, input, …]       Alpaca's; chat template
    input, output                          the README's, `<_user>` and `<_bot>` in `input` part earlier turns;
                                           plain prompt format
    text, or data                          a text to pretrain on, trained whole
"""

import json
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from research.telechat2.common.errors import UsageError
from research.telechat2.data import conversions, fields, sources
from research.telechat2.data.conversions import Conversation, Text
from research.telechat2.text import exact_json
from research.telechat2.text.exact_json import JsonObject
from research.telechat2.text.messages import ANSWERS, BYTE_ORDER_MARK, check_question


class _Format(NamedTuple):
    name: str
    fields: frozenset[str]  # another one is metadata, or an error (see fields)
    convert: Callable[[JsonObject], Conversation | Text]


def _format(name: str, fields: str, convert: Callable[[JsonObject], Conversation | Text]) -> _Format:
    return _Format(name, frozenset(fields.split()), convert)


_ALPACA = "instruction input output system history"
# A line has the format of the first of these keys that it has a value for.
_FORMATS = {
    "messages": _format("messages", "messages tools", conversions.from_messages),
    "dialog": _format("system+dialog", "dialog system", conversions.from_dialog),
    "conversations": _format("conversations", "conversations system tools", conversions.from_sharegpt),
    "instruction": _format("instruction", _ALPACA, conversions.from_alpaca),
    "input": _format("input/output", "input output", conversions.from_input),
    "output": _format("input/output", "input output", conversions.from_input),
    "text": _format("text", "text", partial(conversions.from_text, key="text")),
    "data": _format("data", "data", partial(conversions.from_text, key="data")),
}
_EXPECTED = "input and output, or messages, or system and dialog"
_UNMARKED = frozenset().union(*(kind.fields for kind in _FORMATS.values()))  # these fields mark nothing
# Fields of a test set that hold the expected answer; a question does not need them.
_OF_A_TEST = frozenset(
    {*("answer", "answers", "reference", "references", "target", "targets", "expected", "expected_output")}
    | {*("label", "labels", "gold", "ideal", "response", "completion", "solution", "ground_truth")}
)
_STARTS = {
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "UTF-16"),
    b"\x1f\x8b": "packed by gzip: give it a name in .gz, or unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: give it a name in .zst, or unpack it",
    b"PK\x03\x04": "a zip file: unpack it",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ": "packed by xz: unpack it",
    b"PAR1": "a Parquet file: write it as jsonl",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file with git lfs pull, or download it",
    b"<!DOCTYPE": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}
_UNKNOWN = "of no known format"
NOT_TRAINED = "marked as not to be learnt"
UNUSED = "with a field that is not used: "
WEIGHT_0 = "left out by its own weight of 0"


class UnusableLine(UsageError):  # noqa: N818 (a line is at fault, not a programme)
    """A line that cannot be used; ``reason`` names its kind, the message the details."""

    def __init__(self, reason: str, message: object):
        super().__init__(str(message))
        self.reason = reason


def read_lines(path: str | Path, is_data: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of every line of a file, packed or not, blank ones too.

    ``is_data``: the file may be one JSON array, whose items count as lines; else it is a text. UsageError
    where it is not UTF-8.
    """
    for unit, number, line in sources.read_file(path, is_data):
        with naming(path, number, unit):
            text = decode_line(line)
            if not is_data and "\0" in text:
                raise UsageError("holds NUL characters: it is no text, or UTF-16; convert the file to UTF-8")
        yield number, text


def holds_data(path: str | Path) -> bool:
    """Whether the first line of a text file is a conversation or text in JSON, or begins an array of them.

    Of a pipe nothing is read.
    """
    if not Path(path).is_file():
        return False
    for _, line in read_lines(path, is_data=False):
        text = line.strip()
        if not text:
            continue
        if text in ("[", "[{", "{"):
            return True
        try:
            value, _ = json.JSONDecoder(parse_int=float).raw_decode(text)
        except (json.JSONDecodeError, RecursionError):
            return False
        first = value[0] if isinstance(value, list) and value else value
        return isinstance(first, dict) and not first.keys().isdisjoint(sources.LINE_KEYS)
    return False


def decode_line(line: bytes) -> str:
    """Decode a line of a file; byte order marks around it, as files that are joined have, are taken off."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        known = _known_start(line)
        remedy = f" (it seems to be {known})" if known else ""
        raise UnusableLine(
            "not UTF-8", f"not UTF-8 at byte {error.start}{remedy}; convert the file to UTF-8"
        ) from error
    if BYTE_ORDER_MARK not in text:
        return text
    content = text.rstrip("\r\n")
    return content.strip(BYTE_ORDER_MARK) + text[len(content) :]


def _known_start(line: bytes) -> str:
    """What a file that begins so is, with the remedy; "" where nothing is known."""
    return next((known for start, known in _STARTS.items() if line.startswith(start)), "")


@contextmanager
def naming(path: str | Path, number: int, unit: str = "line") -> Iterator[None]:
    """Put file and line number before the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}, {unit} {number}: {error}") from error


def parse_line(line: str, ignored: Set[str] = frozenset()) -> Conversation:
    """Parse one jsonl line that holds a conversation. UsageError when it does not."""
    return _conversation(*parse(line, ignored))


def parse_question(line: str, ignored: Set[str] = frozenset()) -> Conversation:
    """Parse a line of a test set: a conversation without its last answer, which may be empty or missing.

    Fields with the expected answer, and marks of what is trained, are left out. UsageError when it is
    no conversation.
    """
    data = _read(line)
    left_out = {name for name in data if name in _OF_A_TEST - _UNMARKED or fields.is_mark(name)}
    data = fields.without(data, left_out)
    if any(data.get(name) is not None for name in ("input", "instruction")):
        data["output"] = data.get("output") or ""
    question = _conversation(*_parsed(data, ignored, is_question=True))
    question.render(add_generation_prompt=True)  # checks the messages
    check_question(question.messages)
    return question


def _without_answer(messages: list[JsonObject]) -> list[JsonObject]:
    """The messages up to the last question, and without marks of what is trained."""
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") in ANSWERS:
        messages = messages[:-1]
    return [
        {name: value for name, value in message.items() if not fields.is_mask(name)}
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def _conversation(kind: str, parsed: Conversation | Text) -> Conversation:
    if isinstance(parsed, Text):
        raise UsageError(f"has the keys {kind}; expected a conversation: {_EXPECTED}")
    return parsed


def parse(line: str, ignored: Set[str] = frozenset()) -> tuple[str, Conversation | Text]:
    """Parse one jsonl line; return the name of its format and what it holds.

    ``ignored``: fields of the line and of its messages that count as absent. Raises UnusableLine when it is
    not JSON, of no known format, not what its format asks for, or has fields whose text would be lost.
    """
    return _parsed(_read(line), ignored)


def _read(line: str) -> JsonObject:
    try:
        data = exact_json.loads(line)
        if isinstance(data, dict):
            return fields.of_table(data)
    except (json.JSONDecodeError, UsageError) as error:
        why = _why_not_json(line, error)
        raise UnusableLine(
            "not JSON", f"not JSON ({error}); each line must be one complete JSON object{why}"
        ) from error
    raise UnusableLine(
        _UNKNOWN, f"holds a JSON {type(data).__name__}; expected an object with input and output, or messages"
    )


def _why_not_json(line: str, error: json.JSONDecodeError | UsageError) -> str:
    """What a line seems to be that is no JSON, with the remedy; "" where nothing is known."""
    if known := _known_start(line[:64].lstrip().encode(errors="replace")):
        return f". The file seems to be {known}"
    if "\0" in line:
        return ". It holds NUL characters: the file is cut short, or UTF-16 without its mark"
    if "\r" in line.strip("\r\n"):
        return ". It holds carriage returns (\\r) alone, as old Macs end lines: write line feeds"
    if not isinstance(error, json.JSONDecodeError) or not error.msg.startswith("Extra data"):
        several = line.strip() in ("{", "[")
        return ". An object over several lines is read from a .json file" if several else ""
    rest = line[error.pos :].strip()
    if rest.startswith(BYTE_ORDER_MARK):
        return (
            f". A byte order mark (U+FEFF) stands at character {error.pos + 1}, as where files are joined "
            f"without a line break: put one there"
        )
    if rest.startswith(("{", "[")):
        return f". Another value begins at character {error.pos + 1}: put a line break before it"
    return ". Lines have no commas between them: remove it" if rest == "," else ""


def _parsed(
    data: JsonObject, ignored: Set[str], is_question: bool = False
) -> tuple[str, Conversation | Text]:
    unused: list[str] = []
    if ignored:
        unused = [name for name in data if name in ignored and fields.has_content(data[name])]
        if not is_question:
            _check_marks(data, ignored)
        data = fields.without(data, ignored)
    kind = _kind(data)
    used: Set[str] = _FORMATS[kind].fields
    if not data.keys() <= _UNMARKED:
        used = used | {name for name in data if fields.is_mark(name)}
        if not is_question:
            _check_marks(data)
    try:
        unused += fields.check_unused(data, used, beside=f" beside {kind}")
        parsed = _FORMATS[kind].convert(data)
        if isinstance(parsed, Conversation):
            messages = _without_answer(parsed.messages) if is_question else parsed.messages
            cleaned = [
                fields.clean_message(message, number, ignored, unused)
                for number, message in enumerate(messages, 1)
            ]
            parsed = parsed._replace(messages=cleaned)
    except fields.LostText as error:
        raise UnusableLine(f"{UNUSED}{', '.join(error.names)}", error) from error
    except (UsageError, RecursionError) as error:
        raise unusable(error) from error
    return _FORMATS[kind].name, parsed._replace(unused=tuple(unused)) if unused else parsed


def _check_marks(data: JsonObject, ignored: Set[str] = frozenset()) -> None:
    """Refuse a line that is marked as not to be trained, or with what is no mark."""
    try:
        fields.check_judgement(data, ignored)
        weight = None if ignored else fields.weight_of(data)
    except UsageError as error:
        raise UnusableLine(NOT_TRAINED, error) from error
    if weight == 0:
        raise UnusableLine(WEIGHT_0, "has the weight 0")


def unusable(error: UsageError | RecursionError) -> UnusableLine:
    """Return the error of a line that is not what its format asks for; one may be nested too deeply."""
    message = f"is nested too deeply ({error})" if isinstance(error, RecursionError) else error
    return UnusableLine("not what its format asks for", message)


def _kind(data: JsonObject) -> str:
    kind = next((key for key in _FORMATS if data.get(key) is not None), None)
    if kind is None:  # tables of several formats have the columns of all, null where they are not used
        kind = next((key for key in _FORMATS if key in data), None)
    if kind is None:
        keys = ", ".join(data) or "(none)"
        why = fields.preference(data) or f"the keys {keys}; expected {_EXPECTED}, or text{_renamed(data)}"
        raise UnusableLine(_UNKNOWN, f"has {why}")
    return "instruction" if kind in ("input", "output") and "instruction" in data else kind


# What other data sets call the fields of the formats.
_OTHER_NAMES = {
    **dict.fromkeys(("prompt", "question", "query", "problem"), "instruction"),
    **dict.fromkeys(("response", "completion", "answer", "target", "solution"), "output"),
    "system_prompt": "system",
    "conversation": "messages (role and content) or conversations (from and value)",
    "items": "conversations",
    "dialogue": "dialog",
    "content": "text",
}


def _renamed(data: JsonObject) -> str:
    """How to rename the keys of a line that has none of a format."""
    if {"role", "content"} <= data.keys() or {"from", "value"} <= data.keys():
        name = "messages" if "role" in data else "conversations"
        return f'; a message alone is no conversation: write {{"{name}": […]}} around all of one'
    pairs = [
        f"{name} to {_OTHER_NAMES[name.strip().lower()]}"
        for name in data
        if name.strip().lower() in _OTHER_NAMES
    ]
    pairs += [
        f"{name!r} to {name.strip().lower()}"
        for name in data
        if name.strip().lower() in _UNMARKED and name not in _UNMARKED
    ]
    return f"; rename {', '.join(pairs)}" if pairs else ""
