"""From each format's JSON object to messages, as ``telechat_chat.render`` takes them."""

import re

from research.telechat2.common.errors import UsageError
from research.telechat2.text import exact_json
from research.telechat2.text.messages import NOTHING, is_blank
from research.telechat2.text.vocabulary import BOT, END, START, SYSTEM, USER

_TURN = re.compile(f"({USER}|{BOT})")
_CLOSING = re.compile(rf"{END}\s*\Z")
_SHAREGPT_ROLES = {
    **{name: "system" for name in ("system",)},
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant", "bot", "function_call")},
    **{name: "tool" for name in ("observation", "tool", "function_response")},
}


def from_messages(data: dict) -> tuple[list[dict], list[dict] | None]:
    """OpenAI's: (messages, tools); tools may be JSON in a string, as tables need it."""
    return _list(data, "messages"), _tools(data)


def from_dialog(data: dict) -> tuple[list[dict], None]:
    """TeleChat2's own: (messages, None)."""
    messages = _list(data, "dialog")
    if data.get("system") is not None:
        # The template ends the system text with a newline of its own.
        system = {"role": "system", "content": _string(data, "system").removesuffix("\n")}
        messages = [system, *messages]
    return messages, None


def from_sharegpt(data: dict) -> tuple[list[dict], list[dict] | None]:
    """ShareGPT's: (messages, tools); tools and function calls may be JSON in a string."""
    messages = []
    if data.get("system") is not None:
        messages.append({"role": "system", "content": _string(data, "system")})
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
    return messages, _tools(data)


def from_alpaca(data: dict) -> tuple[list[dict], None]:
    """Alpaca's: (messages, None). The input follows the instruction on a line of its own."""
    messages = []
    if data.get("system") is not None:
        messages.append({"role": "system", "content": _string(data, "system")})
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
    messages.append({"role": "user", "content": question})
    return messages + _answer(data), None


def from_input(data: dict) -> list[dict]:
    """The README's input and output, as messages; of an older one, all in the input, its last answer too."""
    question = _string(data, "input")
    if SYSTEM in question:
        raise UsageError(
            f"input contains {SYSTEM}, but this format has no system prompt; "
            f"write the conversation as messages, or as system and dialog"
        )
    messages = _turns(question)
    if messages[-1]["role"] == "user":
        return messages + _answer(data)
    if data.get("output") not in NOTHING:
        raise UsageError("input ends with an answer; it must end with the question that output answers")
    return messages


def non_empty(data: dict, key: str) -> str:
    """Return a string of pretraining data; UsageError when it is none, or empty."""
    text = _string(data, key)
    if is_blank(text):
        blank = "blank" if text else "empty"
        raise UsageError(f"{key} is {blank}; there is nothing to learn from it: remove the line")
    return text


def _turns(text: str) -> list[dict]:
    """Split ``input`` at its markers into user and assistant turns.

    A leading `<_start>`, white space before the first marker, a missing first `<_user>`, `<_end>` at the end
    of an earlier answer and a closing `<_bot>` are all ways people write the same; any other special text is
    text.
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


def _answer(data: dict) -> list[dict]:
    return [{"role": "assistant", "content": _string(data, "output")}]


def _tools(data: dict) -> list[dict] | None:
    tools = data.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools are") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise UsageError(f"tools are a {type(tools).__name__}; expected a list of function descriptions")
    return tools


def _calls(value: object, number: int) -> list:
    calls = _json(value, f"turn {number} of conversations is a function call, but") if isinstance(
        value, str
    ) else value  # fmt: skip
    return calls if isinstance(calls, list) else [calls]


def _json(text: str, what: str) -> object:
    try:
        return exact_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} not JSON ({error}); correct it") from error


def _keys(value: object) -> str:
    return ", ".join(value) or "no keys" if isinstance(value, dict) else f"a {type(value).__name__}"


def _string(data: dict, key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        found = f"is a {type(value).__name__}" if key in data else "is missing"
        remedy = ""
        if isinstance(value, (list, dict)):
            is_rows = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
            remedy = " (of an object around the data give the array alone)" if is_rows else ""
            remedy = remedy or " (a table is written row by row, a conversation as messages)"
        raise UsageError(f"{key} {found}; expected a string{remedy}")
    return value


def _list(data: dict, key: str) -> list:
    if not isinstance(data[key], list):
        raise UsageError(f"{key} is a {type(data[key]).__name__}; expected a list of messages")
    return data[key]
