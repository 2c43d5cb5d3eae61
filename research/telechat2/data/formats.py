"""Training data formats: one jsonl line -> one conversation.

Told apart by their keys:
    input, output         the README's; `<_user>` and `<_bot>` in `input` part earlier turns; plain format
    messages [, tools]    OpenAI's; chat format
    dialog [, system]     TeleChat2's own; tools are pre-rendered in the contents; chat format
Every answer of a conversation is trained; one that ends with a question waits for its answer.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from research.telechat2 import telechat_chat

# Keys that carry text; one that a line's format has no use for is an error: its text would be lost.
_FORMATS = {
    "messages": {"messages", "tools"},
    "dialog": {"dialog", "system"},
    "input": {"input", "output"},
    "output": {"input", "output"},
}
_TEXT_KEYS = set().union(*_FORMATS.values()) | {
    *("instruction", "history", "prompt", "query", "question", "answer", "response", "conversations", "text"),
}
_TURN = re.compile(f"({telechat_chat.USER}|{telechat_chat.BOT})")
_CLOSING = re.compile(rf"{telechat_chat.END}\n?\Z")


class Conversation(NamedTuple):
    """One line of data: what ``telechat_chat.render`` takes, and the prompt format it is written in."""

    messages: list[dict]
    tools: list[dict] | None
    prompt_format: str
    tool_tags_in_content: bool = False

    def render(self, prompt_format: str | None = None) -> list[telechat_chat.Segment]:
        """Render with the conversation's own prompt format or the given one."""
        return telechat_chat.render(
            self.messages,
            self.tools,
            prompt_format=prompt_format or self.prompt_format,
            tool_tags_in_content=self.tool_tags_in_content,
        )


def input_files(path: str | Path) -> list[Path]:
    """Return the jsonl files of a path: itself, or those of a directory, sorted; ValueError if none."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise ValueError(f"{path} holds no .jsonl file; give a jsonl file or a directory of such")
        return files
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a jsonl file or a directory of such")
    return [path]


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of every line, blank ones too; ValueError where it is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with naming(path, number):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
            yield number, text


@contextmanager
def naming(path: str | Path, number: int) -> Iterator[None]:
    """Put file and line number before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def parse_line(line: str) -> Conversation:
    """Parse one jsonl line. ValueError when it is not JSON or of no known format."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); each line must be one complete JSON object") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"holds a JSON {type(data).__name__}; expected an object with input and output, or messages"
        )
    kind = next((key for key in _FORMATS if key in data), None)
    if kind is None:
        raise ValueError(
            f"has the keys {', '.join(data) or '(none)'}; "
            f"expected input and output, or messages, or system and dialog"
        )
    unused = [key for key in data if key in _TEXT_KEYS - _FORMATS[kind] and data[key]]
    if unused:
        raise ValueError(
            f"has {', '.join(unused)} beside {kind}, and their text would be lost; use one format per line"
        )
    return {"messages": _from_messages, "dialog": _from_dialog}.get(kind, _from_input)(data)


def _from_messages(data: dict) -> Conversation:
    tools = data.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools are a {type(tools).__name__}; expected a list of function descriptions")
    return Conversation(_list(data, "messages"), tools, "chat")


def _from_dialog(data: dict) -> Conversation:
    messages = _list(data, "dialog")
    if data.get("system") is not None:
        # The template ends the system text with a newline of its own.
        system = {"role": "system", "content": _string(data, "system").removesuffix("\n")}
        messages = [system, *messages]
    return Conversation(messages, None, "chat", tool_tags_in_content=True)


def _from_input(data: dict) -> Conversation:
    question, answer = _string(data, "input"), _string(data, "output")
    if telechat_chat.SYSTEM in question:
        raise ValueError(
            f"input contains {telechat_chat.SYSTEM}, but this format has no system prompt; "
            f"write the conversation as messages, or as system and dialog"
        )
    messages = _turns(question)
    messages.append({"role": "assistant", "content": answer})
    return Conversation(messages, None, "plain")


def _turns(text: str) -> list[dict]:
    """Split ``input`` at its markers into user and assistant turns, the last one the user's.

    A leading `<_start>`, a missing first `<_user>`, `<_end>` at the end of an earlier answer and a closing
    `<_bot>` are all ways people write the same; any other special text is text.
    """
    text = text.removeprefix(telechat_chat.START)
    first, *rest = _TURN.split(text)
    turns = list(zip(rest[::2], rest[1::2], strict=True))
    if first or not turns:
        turns.insert(0, (telechat_chat.USER, first))
    if turns[-1] == (telechat_chat.BOT, ""):
        turns.pop()
    messages = []
    for number, (marker, content) in enumerate(turns):
        expected = telechat_chat.BOT if number % 2 else telechat_chat.USER
        if marker != expected:
            raise ValueError(
                f"turn {number + 1} of input begins with {marker}; expected {expected}, since turns alternate"
            )
        if marker == telechat_chat.BOT:
            content = _CLOSING.sub("", content)
        messages.append({"role": "user" if marker == telechat_chat.USER else "assistant", "content": content})
    if len(turns) % 2 == 0:
        raise ValueError("input ends with an answer; it must end with the question that output answers")
    return messages


def _string(data: dict, key: str) -> str:
    if not isinstance(data.get(key), str):
        found = f"is a {type(data[key]).__name__}" if key in data else "is missing"
        raise ValueError(f"{key} {found}; expected a string")
    return data[key]


def _list(data: dict, key: str) -> list:
    if not isinstance(data[key], list):
        raise ValueError(f"{key} is a {type(data[key]).__name__}; expected a list of messages")
    return data[key]
