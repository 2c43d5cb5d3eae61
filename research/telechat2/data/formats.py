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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from research.telechat2 import telechat_chat
from research.telechat2.data import conversions

# Keys that carry text; one that a line's format has no use for is an error: its text would be lost.
_FORMATS = {
    "messages": {"messages", "tools"},
    "dialog": {"dialog", "system"},
    "conversations": {"conversations", "system", "tools"},
    "instruction": {"instruction", "input", "output", "system", "history"},
    "input": {"input", "output"},
    "output": {"input", "output"},
    "text": {"text"},
    "data": {"data"},
}
_TEXT_KEYS = set().union(*_FORMATS.values()) | {
    *("prompt", "query", "question", "answer", "response", "functions"),
}
_EXPECTED = "input and output, or messages, or system and dialog"


class UnusableLine(ValueError):  # noqa: N818 (a line is at fault, not a programme)
    """A line that cannot be used; ``reason`` names its kind, the message the details."""

    def __init__(self, reason: str, message: object):
        super().__init__(str(message))
        self.reason = reason


class Conversation(NamedTuple):
    """One line of data: what ``telechat_chat.render`` takes, and the prompt format it is written in."""

    messages: list[dict]
    tools: list[dict] | None
    prompt_format: str
    tool_tags_in_content: bool = False

    def render(
        self, prompt_format: str | None = None, train_on: str = "answers"
    ) -> list[telechat_chat.Segment]:
        """Render with the conversation's own prompt format or the given one."""
        return telechat_chat.render(
            self.messages,
            self.tools,
            prompt_format=prompt_format or self.prompt_format,
            tool_tags_in_content=self.tool_tags_in_content,
            train_on=train_on,
        )


class Text(NamedTuple):
    """One line of pretraining data."""

    content: str
    prompt_format: str = "plain"  # which begins with <_start> as well

    def render(self, prompt_format: str = "plain", train_on: str = "answers") -> list[telechat_chat.Segment]:
        """Return `<_start>`, the text and `<_end>`; all but the first is trained, whatever is asked for."""
        return [
            telechat_chat.Segment(telechat_chat.START, special=True),
            telechat_chat.Segment(self.content, trained=True),
            telechat_chat.Segment(telechat_chat.END, special=True, trained=True),
        ]


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of every line, blank ones too; ValueError where it is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with naming(path, number):
                text = decode_line(line, number == 1)
            yield number, text


def decode_line(line: bytes, is_first: bool) -> str:
    """Decode a line of a file, whose first one may begin with a byte order mark."""
    try:
        return line.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        raise UnusableLine(
            "not UTF-8", f"not UTF-8 at byte {error.start}; convert the file to UTF-8"
        ) from error


@contextmanager
def naming(path: str | Path, number: int) -> Iterator[None]:
    """Put file and line number before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def parse_line(line: str) -> Conversation:
    """Parse one jsonl line that holds a conversation. ValueError when it does not."""
    kind, parsed = parse(line)
    if isinstance(parsed, Text):
        raise ValueError(f"has the keys {kind}; expected a conversation: {_EXPECTED}")
    return parsed


def parse(line: str) -> tuple[str, Conversation | Text]:
    """Parse one jsonl line; return the name of its format and what it holds.

    Raises UnusableLine when it is not JSON, of no known format, or not what its format asks for.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableLine(
            "not JSON", f"not JSON ({error}); each line must be one complete JSON object"
        ) from error
    kind = _kind(data)
    try:
        return _NAMES.get(kind, kind), _CONVERSIONS[kind](data)
    except (ValueError, RecursionError) as error:
        raise unusable(error) from error


def unusable(error: ValueError | RecursionError) -> UnusableLine:
    """Return the error of a line that is not what its format asks for; one may be nested too deeply."""
    message = f"is nested too deeply ({error})" if isinstance(error, RecursionError) else error
    return UnusableLine("not what its format asks for", message)


def _kind(data: object) -> str:
    reason = "of no known format"
    if not isinstance(data, dict):
        raise UnusableLine(
            reason,
            f"holds a JSON {type(data).__name__}; expected an object with input and output, or messages",
        )
    kind = next((key for key in _FORMATS if key in data), None)
    if kind is None:
        raise UnusableLine(
            reason, f"has the keys {', '.join(data) or '(none)'}; expected {_EXPECTED}, or text"
        )
    unused = [key for key in data if key in _TEXT_KEYS - _FORMATS[kind] and data[key]]
    if unused:
        raise UnusableLine(
            reason,
            f"has {', '.join(unused)} beside {kind}, and their text would be lost; use one format per line",
        )
    return kind


def _chat(convert: Callable, tool_tags_in_content: bool = False) -> Callable[[dict], Conversation]:
    return lambda data: Conversation(*convert(data), "chat", tool_tags_in_content)


def _from_input(data: dict) -> Conversation:
    return Conversation(conversions.from_input(data), None, "plain")


def _from_text(key: str) -> Callable[[dict], Text]:
    return lambda data: Text(conversions.non_empty(data, key))


_NAMES = {"input": "input/output", "output": "input/output", "dialog": "system+dialog"}
_CONVERSIONS: dict[str, Callable[[dict], Conversation | Text]] = {
    "messages": _chat(conversions.from_messages),
    "dialog": _chat(conversions.from_dialog, tool_tags_in_content=True),
    "conversations": _chat(conversions.from_sharegpt),
    "instruction": _chat(conversions.from_alpaca),
    "input": _from_input,
    "output": _from_input,
    "text": _from_text("text"),
    "data": _from_text("data"),
}
