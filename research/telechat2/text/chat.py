"""The one renderer of conversations: messages -> segments -> ids and loss mask.

Training, prediction, serving and evaluation all call ``render``. A segment is either one special token or
literal text: what a message contains is encoded as text, so ``<_end>`` typed by a user ends nothing. The
loss mask is 1 on answers (tool calls included) and on the ``<_end>`` that closes them, 0 elsewhere.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from research.telechat2.common.errors import UsageError, naming
from research.telechat2.text import exact_json
from research.telechat2.text import prompt_format as prompt_formats
from research.telechat2.text.exact_json import JsonObject
from research.telechat2.text.messages import ANSWERS, checked_messages, short
from research.telechat2.text.vocabulary import BOT, END, START, SYSTEM, TOOL_TAGS, USER, Vocabulary

# The system message of a conversation that has none, in the chat template.
DEFAULT_SYSTEM = (
    "你是中国电信星辰语义大模型，英文名是TeleChat，"
    "你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）研发的人工智能助手。"
)
TOOLS_HEAD = (
    "\n\n# 可用工具\n"
    "你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,以下是可用工具详情：\n"
    "<tools>\n"
)
TOOLS_TAIL = (
    "</tools>\n\n# 调用方法\n你需要遵循工具的要求，使用json格式返回工具名称及参数，"
    "并用<tool_call></tool_call>包含。下方是一个调用模板：\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n'
)
_TOOL_TAG = re.compile("(" + "|".join(map(re.escape, TOOL_TAGS)) + ")")
# What of a conversation is trained. System text and the results of tools never are.
TRAIN_ON = ("answers", "last_answer", "everything")


class Segment(NamedTuple):
    """One special token, or literal text; ``trained``: whether the loss counts it."""

    text: str
    special: bool = False
    trained: bool = False


_Pieces = Callable[[str, bool], list[Segment]]


def render(
    messages: list[JsonObject],
    tools: list[JsonObject] | None = None,
    *,
    prompt_format: str = "chat",
    add_generation_prompt: bool = False,
    tool_tags_in_content: bool = False,
    train_on: str = "answers",
    allow_empty: bool | None = None,
) -> list[Segment]:
    """Render a conversation.

    ``messages``: dicts with ``role`` (system, user, assistant or its synonym bot, tool), ``content`` (str, or
    a list of OpenAI's text parts; None beside tool calls) and, for the assistant, ``tool_calls`` in OpenAI's
    shape (arguments a dict or its JSON) and ``weight`` (0: this answer is not trained; 1: as without). A
    system message stands first; without one the chat format uses DEFAULT_SYSTEM. ``tools``: OpenAI's function
    descriptions. The plain format has neither system prompt nor tools, and neither has v1, which is the plain
    one without ``<_start>``. ``add_generation_prompt`` ends with ``<_bot>``. ``allow_empty``: nothing is
    trained, so that messages may be blank, and answers follow one another; by default as
    ``add_generation_prompt``. ``tool_tags_in_content``: the contents are pre-rendered, tool tags in them are
    special (``dialog`` data). ``train_on``: the answers; the last one only; or everything, which adds the
    questions, the markers ``<_user>`` and ``<_bot>`` and the newline behind an answer, but not the results of
    tools, with tags in a user's content or from the role tool, nor the ``<_user>`` before them.

    UsageError names the message at fault.
    """
    prompt_formats.check(prompt_format)
    if train_on not in TRAIN_ON:
        raise UsageError(f"train_on is {train_on!r}; expected one of {', '.join(TRAIN_ON)}")
    messages = checked_messages(messages, add_generation_prompt if allow_empty is None else allow_empty)
    everything = train_on == "everything"
    answers = trained_answers(messages, train_on)
    pieces = _text_with_tags if tool_tags_in_content else _literal
    if prompt_format == "chat":
        segments = _system_turn(messages[0], tools, pieces)
    else:
        _refuse_in_plain(messages, tools, prompt_format)
        segments = [Segment(START, special=True)] if prompt_format == "plain" else []
    previous = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role == "user":
            segments += _user_turn(pieces(message["content"], False), everything)
        elif role in ANSWERS:
            trained = number in answers
            around = everything and trained
            segments.append(Segment(BOT, True, around))
            segments += _answer(message, number, pieces, trained)
            if prompt_format == "chat":
                segments.append(Segment("\n", False, around))
        elif role == "tool":
            segments.append(Segment("\n") if previous == "tool" else Segment(USER, True))
            segments += _tagged("tool_response", message["content"], False)
        previous = role
    if add_generation_prompt:
        segments.append(Segment(BOT, True))
    return segments


def runs(segments: list[Segment], special_ids: Mapping[str, int]) -> list[tuple[int | str, bool]]:
    """Return what is encoded, in order: (id of a special token, or text; whether it is trained).

    ``special_ids``: those of the vocabulary. Adjacent text is joined before it is encoded; a tool tag that
    the vocabulary lacks is text, any other special token that it lacks a UsageError.
    """
    found: list[tuple[int | str, bool]] = []
    before = None  # the text that what follows may belong to
    for text, special, trained in segments:
        index = special_ids.get(text) if special else None
        if index is not None:
            found.append((index, trained))
            before = None
            continue
        if special and text not in TOOL_TAGS:
            raise UsageError(f"the vocabulary has no special token {text!r}; use a TeleChat2 tokenizer.model")
        if before is not None:
            # Where tool tags are text, a result shares its run with the question, and is never trained.
            text, trained = before + text, found.pop()[1] and trained
        found.append((text, trained))
        before = text
    return found


def encode(segments: list[Segment], vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Return ids and loss mask (1 where trained), of equal length; see ``runs`` for what is text."""
    ids: list[int] = []
    mask: list[int] = []
    for run, trained in runs(segments, vocabulary.special_ids):
        new = vocabulary.encode_text(run) if isinstance(run, str) else [run]
        ids += new
        mask += [int(trained)] * len(new)
    return ids, mask


def conversation_text(segments: list[Segment]) -> str:
    """Return the rendered conversation as the chat template's text."""
    return "".join(segment.text for segment in segments)


# ---------------------------------------------------------------------- turns
def _system_turn(first: JsonObject, tools: list[JsonObject] | None, pieces: _Pieces) -> list[Segment]:
    has_text = first["role"] == "system"
    system = pieces(first["content"], False) if has_text else [Segment(DEFAULT_SYSTEM)]
    if tools:
        lines = "".join(_tool_json(tool, i) + "\n" for i, tool in enumerate(tools, 1))
        system += [Segment(TOOLS_HEAD + lines), *_text_with_tags(TOOLS_TAIL, False)]
    return [Segment(SYSTEM, True), *system, Segment("\n")]


def _user_turn(pieces: list[Segment], trained: bool) -> list[Segment]:
    """A user's turn; results of tools in it, tags and the space between them included, are not trained."""
    if not trained:
        return [Segment(USER, True), *pieces]
    opening, closing = TOOL_TAGS[2:]
    has_results = any(special and text == opening for text, special, _ in pieces)
    marked, in_result = [], False
    for text, special, _ in pieces:
        in_result |= special and text == opening
        marked.append(Segment(text, special, not in_result and not (has_results and text.isspace())))
        in_result &= not (special and text == closing)
    return [Segment(USER, True, bool(marked) and marked[0].trained), *marked]


def _answer(message: JsonObject, number: int, pieces: _Pieces, trained: bool) -> list[Segment]:
    segments = pieces(message.get("content") or "", trained)
    for i, call in enumerate(message.get("tool_calls") or ()):
        segments += _literal("\n" if i else "", trained)
        segments += _tagged("tool_call", _call_json(call, f"message {number}"), trained)
    segments.append(Segment(END, True, trained))
    return segments


def trained_answers(messages: list[JsonObject], train_on: str) -> set[int]:
    """Numbers, from 1, of the answers that are trained."""
    answers = [n for n, message in enumerate(messages, 1) if message["role"] in ANSWERS]
    if train_on == "last_answer":
        answers = answers[-1:]
    return {n for n in answers if messages[n - 1].get("weight") in (None, 1)}


def _tagged(tag: str, text: str, trained: bool) -> list[Segment]:
    parts = (f"<{tag}>", True), (f"\n{text}\n", False), (f"</{tag}>", True)
    return [Segment(part, special, trained) for part, special in parts]


def _literal(text: str, trained: bool) -> list[Segment]:
    return [Segment(text, False, trained)] if text else []


def _text_with_tags(text: str, trained: bool) -> list[Segment]:
    if "tool_" not in text:
        return _literal(text, trained)
    return [Segment(part, part in TOOL_TAGS, trained) for part in _TOOL_TAG.split(text) if part]


def _function_of(description: object, what: str, expected: str) -> JsonObject:
    """The function that a tool or a call of one describes."""
    function = description.get("function", description) if isinstance(description, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"{what} is {short(description)}; expected {{{expected}}}")
    return function


def _call_json(call: object, where: str) -> str:
    function = _function_of(call, f"{where}: a tool call", '"function": {"name": "…", "arguments": {…}}')
    arguments, what = function.get("arguments"), f"{where}: the arguments of tool call {function['name']!r}"
    if isinstance(arguments, str):
        try:
            arguments = exact_json.loads(arguments)
        except (json.JSONDecodeError, UsageError) as error:
            raise UsageError(f"{what} are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise UsageError(f"{what} are {arguments!r}; expected an object")
    with naming(what):
        return exact_json.dumps({"name": function["name"], "arguments": arguments})


def _tool_json(tool: object, number: int) -> str:
    function = _function_of(tool, f"tool {number}", '"type": "function", "function": {"name": …, …}')
    with naming(f"tool {number} ({function['name']!r})"):
        return exact_json.dumps(tool)


def _refuse_in_plain(messages: list[JsonObject], tools: list[JsonObject] | None, prompt_format: str) -> None:
    has_system = messages[0]["role"] == "system" and messages[0]["content"]
    has_tools = tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if has_tools or has_system:
        used = "tools" if has_tools else "a system prompt"
        raise UsageError(f"the {prompt_format} prompt format has no place for {used}; use 'chat'")
