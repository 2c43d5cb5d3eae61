"""What messages may be, their roles, contents and order: the renderer checks each conversation by this."""

from research.telechat2.common.errors import UsageError
from research.telechat2.text.exact_json import JsonObject

ROLES = ("system", "user", "assistant", "bot", "tool")
ANSWERS = ("assistant", "bot")
# Keys of a message that name or link things the template does not print.
SILENT_KEYS = frozenset({"name", "tool_call_id", "id", "type"})
KNOWN_KEYS = frozenset({"role", "content", "tool_calls", "weight"}) | SILENT_KEYS
NOTHING: tuple[object, ...] = (None, "", [], {})  # values of a key that mean no more than its absence
TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's chat API, and its Responses API
# Whatever prints nothing: white space of every script, and characters of no width. Other control characters
# are text, if an odd one.
_BLANK = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0"
_BLANK += "".join(map(chr, (0xAD, 0x034F, 0x061C, 0x1680, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10))))
_BLANK += "".join(map(chr, (*range(0x2000, 0x2010), *range(0x2028, 0x2030), *range(0x205F, 0x2070))))
_BLANK += "\u115f\u1160\u2800\u3000\u3164\ufeff\uffa0"


BYTE_ORDER_MARK = "\ufeff"


def without_byte_order_marks(text: str) -> str:
    """A question or prompt without the byte order marks around it; UsageError for one inside."""
    content = text.strip(BYTE_ORDER_MARK)
    if BYTE_ORDER_MARK in content:
        at = text.index(BYTE_ORDER_MARK, 1) + 1
        raise UsageError(f"a byte order mark (U+FEFF) stands at character {at} of {short(text)}; remove it")
    return content


def is_blank(text: str) -> bool:
    """Whether nothing in ``text`` can be seen: it is empty, white space, or of no width."""
    return not text.strip(_BLANK)


def with_text_content(message: JsonObject, number: int) -> JsonObject:
    """A message whose content is a list of OpenAI's text parts, with their texts joined; others as they are.

    ``number``: of the message, from 1, for errors. UsageError if a part is no text.
    """
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = []
    for i, part in enumerate(parts, 1):
        text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else None
        if not isinstance(text, str):
            found = f"of type {part['type']!r}" if isinstance(part, dict) and "type" in part else short(part)
            raise UsageError(
                f"message {number} has content {short(parts)}, whose part {i} is {found}; "
                'expected a string, or parts {"type": "text", "text": "…"}'
            )
        texts.append(text)
    return {**message, "content": "".join(texts)}


def checked_messages(messages: object, allow_empty: bool) -> list[JsonObject]:
    """Check a conversation, and return it with contents that are strings, not parts.

    ``allow_empty``: nothing of it is trained, so its messages may be empty. UsageError for a message that
    cannot be rendered, or not be trained.
    """
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"messages are {short(messages)}; expected a list of at least one message")
    answer: JsonObject = {}  # the last one
    open_calls: list[str | None] | None = []  # ids of its calls that wait for a result; None: not counted yet
    previous, found = None, []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise UsageError(f"message {number} is {short(message)}; expected a dict with role and content")
        where = f"message {number}"
        message = with_text_content(message, number)
        if not _is_simple(message):
            _check_message(message, where, allow_empty)
        role = message["role"]
        if role == "system" and number > 1:
            raise UsageError(f"{where} has role 'system'; a system message must be the first one")
        if role == "tool":
            open_calls = _calls_of(answer) if open_calls is None else open_calls
            _close_call(message, open_calls, where)
        elif role in ANSWERS:
            trained = not allow_empty and message.get("weight") != 0
            if previous in ANSWERS and trained and not _calls_of(answer):
                raise UsageError(
                    f"{where} has role {role!r}, and answers no question, as the one before it is an answer; "
                    'correct the role, join the two, or give this one "weight": 0'
                )
            answer, open_calls = message, None
        previous = role
        found.append(message)
    if not any(message["role"] == "user" for message in found):
        raise UsageError("the conversation has no user turn; expected at least one message with role 'user'")
    return found


def check_question(messages: list[JsonObject]) -> None:
    """UsageError if the last message is a question that asks nothing, or there is none."""
    if not messages:
        raise UsageError("there is no message to answer; expected at least a question")
    last = messages[-1]
    if last["role"] == "user" and is_blank(with_text_content(last, len(messages))["content"]):
        raise UsageError(f"message {len(messages)} is an empty question; expected some text to answer")


def out_of_turn(messages: list[JsonObject]) -> int:
    """How many messages follow one of the same side, or answer before anything is asked."""
    count, previous = 0, "assistant"
    for message in messages:
        role = message["role"]
        if role == "system":
            continue
        side = "assistant" if role in ANSWERS else role
        count += side == previous and side != "tool"
        previous = side
    return count


def _calls_of(message: JsonObject) -> list[str | None]:
    calls = message.get("tool_calls")
    found = [call.get("id") if isinstance(call, dict) else None for call in calls] if calls else []
    in_text = (message.get("content") or "").count("<tool_call>")
    return found + [None] * in_text


def _close_call(message: JsonObject, open_calls: list[str | None], where: str) -> None:
    if not open_calls:
        raise UsageError(f"{where} is a tool's result; expected a tool call without result before it")
    answered = message.get("tool_call_id")
    if answered in open_calls:
        open_calls.remove(answered)
    elif answered is None or None in open_calls:
        open_calls.pop(0 if answered is None else open_calls.index(None))
    else:
        expected = ", ".join(map(short, open_calls))
        raise UsageError(f"{where} has tool_call_id {short(answered)}; expected one of {expected}")


def _is_simple(message: JsonObject) -> bool:
    """Whether a message is of the most common kind, which nothing is wrong with."""
    return (
        len(message) == 2
        and message.get("role") in ("user", "assistant", "bot")
        and type(message.get("content")) is str
        and not is_blank(message["content"])
    )


def _check_message(message: JsonObject, where: str, allow_empty: bool) -> None:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise UsageError(f"{where} has role {role!r}; expected one of {', '.join(ROLES)}")
    if not message.keys() <= KNOWN_KEYS and (
        unknown := [key for key in message if key not in KNOWN_KEYS and message[key] not in NOTHING]
    ):
        raise UsageError(f"{where} has {', '.join(map(repr, unknown))}, which cannot be rendered; remove it")
    is_answer = role in ANSWERS
    if calls and not is_answer:
        raise UsageError(f"{where} has tool_calls, but its role is {role!r}; only the assistant calls tools")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise UsageError(f"{where} has weight {short(weight)}; expected 0 (not trained) or 1")
    if weight and not is_answer:
        raise UsageError(f"{where} has weight {weight}, but its role is {role!r}; only answers have a weight")
    if calls is not None and not isinstance(calls, list):
        raise UsageError(f"{where} has tool_calls {short(calls)}; expected a list")
    if not isinstance(content, str) and not (content is None and is_answer and (calls or allow_empty)):
        raise UsageError(f"{where} has content {short(content)}; expected a string")
    must_say = (is_answer and not calls and weight != 0) or role == "user"
    if must_say and not allow_empty and is_blank(content or ""):
        found = "a blank" if content else "an empty"
        kind = "answer" if is_answer else "question"
        why = "there is nothing to learn from it: " if is_answer else ""
        raise UsageError(f"{where} is {found} {kind}; {why}remove it or fill it in")


def short(value: object) -> str:
    """``repr`` of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
