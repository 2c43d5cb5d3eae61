"""What a line of data holds: a conversation, or a text; and how each format's JSON object becomes one."""

import json
import re
from typing import NamedTuple

from research.telechat2.common.errors import UsageError
from research.telechat2.text import chat, exact_json
from research.telechat2.text.exact_json import JsonObject
from research.telechat2.text.messages import NOTHING, is_blank
from research.telechat2.text.vocabulary import BOT, END, START, SYSTEM, USER

_TURN = re.compile(f"({USER}|{BOT})")
_CLOSING = re.compile(rf"{END}\s*\Z")
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


class Conversation(NamedTuple):
    """One line of data: what ``chat.render`` takes, and the prompt format it is written in."""

    messages: list[JsonObject]
    tools: list[JsonObject] | None
    prompt_format: str = "chat"
    tool_tags_in_content: bool = False
    unused: tuple[str, ...] = ()  # fields that are left out: metadata, or named in --ignore_fields

    def render(
        self,
        prompt_format: str | None = None,
        train_on: str = "answers",
        add_generation_prompt: bool = False,
    ) -> list[chat.Segment]:
        """Render with the conversation's own prompt format or the given one."""
        return chat.render(
            self.messages,
            self.tools,
            prompt_format=prompt_format or self.prompt_format,
            add_generation_prompt=add_generation_prompt,
            tool_tags_in_content=self.tool_tags_in_content,
            train_on=train_on,
        )


class Text(NamedTuple):
    """One line of pretraining data."""

    content: str
    prompt_format: str = "plain"  # which begins with <_start> as well
    unused: tuple[str, ...] = ()

    def render(self, prompt_format: str | None = None, train_on: str = "answers") -> list[chat.Segment]:
        """Return `<_start>`, the text and `<_end>`; ``train_on`` does not matter."""
        return [
            chat.Segment(START, special=True),
            chat.Segment(self.content, trained=True),
            chat.Segment(END, special=True, trained=True),
        ]


def from_messages(data: JsonObject) -> Conversation:
    """OpenAI's; tools may be JSON in a string, as tables need it."""
    return Conversation(_list(data, "messages"), _tools(data))


def from_dialog(data: JsonObject) -> Conversation:
    """TeleChat2's own, with tools in the contents. The template adds the system text's last newline."""
    messages = [*_system(data, "\n"), *_list(data, "dialog")]
    return Conversation(messages, None, tool_tags_in_content=True)


def from_sharegpt(data: JsonObject) -> Conversation:
    """ShareGPT's; tools and function calls may be JSON in a string."""
    messages = _system(data)
    for number, turn in enumerate(_list(data, "conversations"), len(messages) + 1):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            is_messages = isinstance(turn, dict) and {"role", "content"} <= turn.keys()
            remedy = "; a list of role and content is called messages" if is_messages else ""
            raise UsageError(
                f"turn {number} of conversations lacks from or value (it has {_keys(turn)}); expected "
                f"both{remedy}"
            )
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise UsageError(
                f"turn {number} of conversations is from {speaker!r}; expected {', '.join(_SHAREGPT_ROLES)}"
            )
        message = {key: value for key, value in turn.items() if key not in ("from", "value")}
        message |= {"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":
            message |= {"content": None, "tool_calls": _calls(turn["value"], number)}
        messages.append(message)
    return Conversation(messages, _tools(data))


def from_alpaca(data: JsonObject) -> Conversation:
    """Alpaca's. The input follows the instruction on a line of its own."""
    messages = _system(data)
    history = [] if data.get("history") in NOTHING else data["history"]
    if not isinstance(history, list):
        raise UsageError(f"history is a {type(history).__name__}; expected a list of [question, answer]")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UsageError(f"pair {number} of history is not a list of two; expected [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = _string(data, "instruction")
    if data.get("input") not in NOTHING:
        question = f"{question}\n{_string(data, 'input')}" if question else _string(data, "input")
    return Conversation([*messages, {"role": "user", "content": question}, _answer(data)], None)


def from_input(data: JsonObject) -> Conversation:
    """The README's input and output; of an older one, all in the input, its last answer too."""
    question = _string(data, "input")
    if SYSTEM in question:
        raise UsageError(
            f"input contains {SYSTEM}, but this format has no system prompt; "
            f"write the conversation as messages, or as system and dialog"
        )
    messages = _turns(question)
    if messages[-1]["role"] == "user":
        messages.append(_answer(data))
    elif data.get("output") not in NOTHING:
        raise UsageError("input ends with an answer; it must end with the question that output answers")
    return Conversation(messages, None, "plain")


def from_text(data: JsonObject, key: str) -> Text:
    """A text to pretrain on, in the field ``key``."""
    text = _string(data, key)
    if is_blank(text):
        blank = "blank" if text else "empty"
        raise UsageError(f"{key} is {blank}; there is nothing to learn from it: remove the line")
    return Text(text)


def _turns(text: str) -> list[JsonObject]:
    """Split ``input`` at its markers into user and assistant turns.

    A leading `<_start>`, white space before the first marker, a missing first `<_user>`, `<_end>` at the end
    of an earlier answer and a closing `<_bot>` are optional; any other special text is text.
    """
    text = text.removeprefix(START)
    first, *rest = _TURN.split(text)
    turns = list(zip(rest[::2], rest[1::2], strict=True))
    if first.strip() or not turns:
        turns.insert(0, (USER, first))
    if turns[-1] == (BOT, ""):
        turns.pop()
    messages = []
    for number, (marker, content) in enumerate(turns):
        expected = BOT if number % 2 else USER
        if marker != expected:
            raise UsageError(
                f"turn {number + 1} of input begins with {marker}; expected {expected}, since turns alternate"
            )
        if marker == BOT:
            content = _CLOSING.sub("", content)
        messages.append({"role": "user" if marker == USER else "assistant", "content": content})
    return messages


def _system(data: JsonObject, ending: str = "") -> list[JsonObject]:
    if data.get("system") is None:
        return []
    return [{"role": "system", "content": _string(data, "system").removesuffix(ending)}]


def _answer(data: JsonObject) -> JsonObject:
    return {"role": "assistant", "content": _string(data, "output")}


def _tools(data: JsonObject) -> list[JsonObject] | None:
    tools = data.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools are") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise UsageError(f"tools are a {type(tools).__name__}; expected a list of function descriptions")
    return tools


def _calls(value: object, number: int) -> list[object]:
    if isinstance(value, str):
        value = _json(value, f"turn {number} of conversations is a function call, but")
    return value if isinstance(value, list) else [value]


def _json(text: str, what: str) -> object:
    try:
        return exact_json.loads(text)
    except (json.JSONDecodeError, UsageError) as error:
        raise UsageError(f"{what} not JSON ({error}); correct it") from error


def _keys(value: object) -> str:
    return ", ".join(value) or "no keys" if isinstance(value, dict) else f"a {type(value).__name__}"


def _string(data: JsonObject, key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        found = f"is a {type(value).__name__}" if key in data else "is missing"
        remedy = ""
        if isinstance(value, list | dict):
            is_rows = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
            remedy = (
                " (of an object around the data give the array alone)"
                if is_rows
                else " (a table is written row by row, a conversation as messages)"
            )
        raise UsageError(f"{key} {found}; expected a string{remedy}")
    return value


def _list(data: JsonObject, key: str) -> list[JsonObject]:
    """The messages of a line, which are checked when they are rendered."""
    messages = data[key]
    if not isinstance(messages, list):
        raise UsageError(f"{key} is a {type(messages).__name__}; expected a list of messages")
    return messages
