"""Fields of a line that its format does not use: metadata pass and are counted, lost text is an error."""

import re
from collections.abc import Set
from functools import lru_cache

from research.telechat2.common.errors import UsageError
from research.telechat2.text.exact_json import JsonObject
from research.telechat2.text.messages import (
    BYTE_ORDER_MARK,
    KNOWN_KEYS,
    NOTHING,
    TEXT_PARTS,
    is_blank,
    short,
    with_text_content,
)

# Names of metadata, compared without case, `_` and `-`; names that end in `_id`, too.
_NAMES = """
id ids idx index uid uuid guid key number no rank source sources dataset data_source origin subset split
dump file file_name file_path path url urls uri link domain domains site model models model_name generator
engine provider annotator annotators worker author authors creator user_name uploader answer_from
human_verified lang language languages locale lang_code language_score encoding charset category categories
subcategory kind type task_type task_name data_type topic topics tag tags subject level difficulty grade
skill ability score scores rating ratings quality reward votes upvotes likes perplexity date time datetime
timestamp created created_at create_time created_time added created_date created_on date_added tree_state
generated_from task tasks cluster repo repo_name commit source_lang target_lang src_lang tgt_lang hashed_ip
moderation openai_moderation detoxify_moderation teacher teacher_model judge_model quality_score updated
updated_at update_time modified year crawl_date version revision seed license licence licenses copyright
rights meta metadata attributes hash md5 sha1 sha256 checksum minhash red_pajama_subset unique_key status
length len size chars tokens token_count num_tokens n_tokens word_count usage turns num_turns turn round
rounds multiturn finish_reason logprobs review_result synthetic lang_detect parallel_tool_calls tool_choice
cache_control
"""
METADATA = tuple(_NAMES.split())
# What data sets call the mark of an answer that is not to be trained; 1 is as without.
MASKS = ("weight", "loss", "loss_weight", "loss_mask", "train", "training", "trainable")
JUDGEMENTS = ("label", "kto_tag", "desirable", "is_desirable", "preferred", "is_preferred", "accepted")
# These mark an answer as not trained where they are false; any other value may mean something else.
VERDICTS = ("correct", "is_correct", "good", "is_good", "is_accepted", "is_chosen", "positive", "is_positive")

_PREFERENCE = "preference data (DPO), of which this training knows no loss: keep the good answers alone"
_MEDIA_FILES = [
    f"{name}{what}"
    for name in ("image", "audio", "video", "img", "picture")
    for what in ("", "s", "path", "paths", "url", "urls", "file", "files")
]
_LOST = {  # why -> names, separated by blanks, of what would be lost
    _PREFERENCE: "chosen rejected chosenresponse rejectedresponse responsechosen responserejected "
    "rejectedmessages margin completions responses preference",
    "a text model neither sees nor hears it": "pixelvalues media speech wav bbox bboxes objects "
    + " ".join(_MEDIA_FILES),
    "no prompt format here has a place for it: write it into the answer, or leave it out": "reasoning "
    "reasoningcontent thought thoughts thinking cot chainofthought rationale think",
    "the old form of a call: write it as tool_calls": "functioncall",
    "the old form of tools: write them as tools": "functions",
    "an answer is called output": "target response",
}
_REASONS = {name: why for why, names in _LOST.items() for name in names.split()}


class LostText(UsageError):  # noqa: N818 (a line is at fault, not a programme)
    """Fields whose text would be lost; ``names`` are theirs."""

    def __init__(self, message: str, names: list[str]):
        super().__init__(message)
        self.names = names


@lru_cache(4096)
def _same(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


_AN_ID = re.compile(r"(?i:[_-]id)$|[a-z]I[dD]$")
_METADATA = frozenset(map(_same, METADATA))
_MASKS = frozenset(map(_same, MASKS))
_JUDGEMENTS = frozenset(map(_same, JUDGEMENTS))
_VERDICTS = frozenset(map(_same, VERDICTS))


def is_mark(name: str) -> bool:
    """Whether a field marks a line or an answer as trained or not; upper case, `_` and `-` do not matter."""
    return _same(name) in _MASKS or _same(name) in _JUDGEMENTS


def is_mask(name: str) -> bool:
    """Whether a field is such a mark of a single answer."""
    return _same(name) in _MASKS


def of_table(data: JsonObject) -> JsonObject:
    """``data`` without what a table leaves in it: a byte order mark before the first column, NaN for nothing.

    Raises:
        UsageError: a key stands twice, with the mark and without.
    """
    for name, value in data.items():
        if value != value or name[:1] == BYTE_ORDER_MARK:
            break
    else:
        return data
    found: JsonObject = {}
    for name, value in data.items():
        name = name.lstrip(BYTE_ORDER_MARK)
        if name in found:
            raise UsageError(f"the key {name!r} stands there with a byte order mark and without; keep one")
        found[name] = None if type(value) is float and value != value else value
    return found


def without(data: JsonObject, ignored: Set[str]) -> JsonObject:
    """``data`` without the fields that are to be ignored."""
    return {name: value for name, value in data.items() if name not in ignored}


def check_unused(
    data: JsonObject, used: Set[str], where: str = "", beside: str = "", strict: bool = False
) -> list[str]:
    """Return the names of the fields beside ``used`` that can be left out: metadata, and what holds no text.

    ``where`` and ``beside`` go into messages, before and behind the names.
    ``strict``: nor can a number under another name, which in a message may mark what is trained.

    Raises:
        LostText: fields whose text would be lost; each is named, with the reason where it is known.
    """
    if data.keys() <= used:
        return []
    left = [name for name, value in data.items() if name not in used and has_content(value)]
    lost = [name for name in left if _is_lost(name, data[name], strict)]
    if lost:
        reasons = dict.fromkeys(
            f"{name}: {_REASONS[_same(name)]}" for name in lost if _same(name) in _REASONS
        )
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise LostText(
            f"{where}has {', '.join(lost)}{beside}, which the format does not use and whose meaning would be "
            f"lost{why}; rename or remove {'it' if len(lost) == 1 else 'them'}, or leave out knowingly: "
            f"--ignore_fields {','.join(lost)}",
            lost,
        )
    return left


def preference(data: JsonObject) -> str:
    """What a line of preference data has, whose other keys are often of no format; "" for any other line."""
    found = [name for name in data if _REASONS.get(_same(name)) == _PREFERENCE]
    return f"{' and '.join(found)}: {_PREFERENCE}, as instruction and output" if found else ""


def has_content(value: object) -> bool:
    """Whether a field means more than its absence does; NaN is how pandas writes an absent one."""
    return value not in NOTHING and value == value and not (isinstance(value, str) and is_blank(value))


def _is_lost(name: str, value: object, strict: bool) -> bool:
    same = _same(name)
    if same in _REASONS:
        return True
    if same in _METADATA or _AN_ID.search(name):
        return False
    return strict or _has_text(value)


def _has_text(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_text, value.values()))
    return isinstance(value, (str, list)) and bool(value)


def check_judgement(data: JsonObject, ignored: Set[str]) -> None:
    """Refuse a line that is marked as not to be learnt (KTO's ``label: false``).

    Raises:
        UsageError: it is, or its mark is neither true nor false. ``ignored`` does not help against
            ``false`` itself, but where the name may mean something else (``VERDICTS``).
    """
    for name, value in data.items():
        same = _same(name)
        if same not in _JUDGEMENTS and (same not in _VERDICTS or name in ignored):
            continue
        mark = value.strip().lower() if isinstance(value, str) else value
        if mark is False or mark == "false":
            other = f", or --ignore_fields {name} if it says something else" if same in _VERDICTS else ""
            raise UsageError(
                f"has {name} {value!r}: it is an answer that is not to be learnt (KTO); remove the line, or "
                f"leave such lines out with --bad_lines skip{other}"
            )
        is_known = not has_content(value) or mark == "true" or (not isinstance(mark, list) and mark == 1)
        if same in _JUDGEMENTS and name not in ignored and not is_known:
            raise UsageError(
                f"has {name} {value!r}; expected true, or false for what is not to be learnt; if it says "
                f"something else, leave it out knowingly: --ignore_fields {name}"
            )


def weight_of(data: JsonObject, where: str = "") -> int | None:
    """The mark of what is not to be trained (0) or is (1), under any of its names; None without one.

    Raises:
        UsageError: a value that is neither, or two that differ.
    """
    found = {
        name: value
        for name, value in data.items()
        if is_mask(name) and value is not None and value == value  # NaN is how pandas writes None
    }
    for name, value in found.items():
        if isinstance(value, (str, list, dict)) or value not in (0, 1):
            raise UsageError(
                f"{where}has {name} {value!r}; expected 0 (not trained) or 1; if it says something else, "
                f"leave it out knowingly: --ignore_fields {name}"
            )
    if len(set(found.values())) > 1:
        marks = " and ".join(f"{name} {value!r}" for name, value in found.items())
        raise UsageError(f"{where}has {marks}, which contradict each other; keep one")
    return int(next(iter(found.values()))) if found else None


_PLAIN_KEYS = frozenset({"role", "content"})
_PART_KEYS = frozenset({"type", "text"})
_CALL_KEYS = frozenset({"id", "type", "index", "function"})
_FUNCTION_KEYS = frozenset({"name", "arguments"})


def clean_message(message: object, number: int, ignored: Set[str], unused: list[str]) -> JsonObject:
    """A message with what the renderer knows; the names of fields that are left out are added to ``unused``.

    A content that is a list of text parts becomes one text.

    Raises:
        UsageError: it is no message, or has a field whose text would be lost, in itself, its parts or its
            calls, or a mark that is none.
    """
    if not isinstance(message, dict):
        raise UsageError(f"message {number} is {short(message)}; expected a dict with role and content")
    if message.keys() == _PLAIN_KEYS and type(message["content"]) is str:
        return message
    where = f"message {number} "
    if ignored and not ignored.isdisjoint(message):
        unused += [name for name in message if name in ignored and has_content(message[name])]
        message = without(message, ignored)
    unused += _unused_inside(message, number, ignored)
    message = with_text_content(message, number)
    masks = {name for name in message if is_mask(name)}
    try:
        unused += check_unused(message, KNOWN_KEYS | masks, where, strict=True)
    except LostText as error:
        if {"from", "value"} <= set(error.names):
            raise UsageError(
                f"{where}has from and value, as ShareGPT's turns have: call the list conversations, or "
                f"write role and content"
            ) from error
        raise
    if has_content(message.get("name")) and message.get("role") != "tool":
        unused.append("name")  # of a person: the template has no place for it
    known = {name: message[name] for name in message if name in KNOWN_KEYS and name != "weight"}
    weight = weight_of(message, where)
    return known if weight is None else {**known, "weight": weight}


def _unused_inside(message: JsonObject, number: int, ignored: Set[str]) -> list[str]:
    """As ``check_unused``, of what stands in a message: parts of its content, calls of tools."""
    content, calls = message.get("content"), message.get("tool_calls")
    inside: list[tuple[object, Set[str], str]] = []
    for i, part in enumerate(content if isinstance(content, list) else [], 1):
        inside.append((part, _PART_KEYS, f"message {number}, part {i} "))
    for i, call in enumerate(calls if isinstance(calls, list) else [], 1):
        where = f"message {number}, tool call {i} "
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            inside += [(call, _CALL_KEYS, where), (function, _FUNCTION_KEYS, where)]
        else:
            inside.append((call, _CALL_KEYS | _FUNCTION_KEYS, where))
    found = []
    for data, used, where in inside:
        if isinstance(data, dict) and not data.keys() <= used:
            found += [name for name in data if name in ignored and has_content(data[name])]
            if data.get("type") in (None, *TEXT_PARTS) or used is not _PART_KEYS:  # others are refused anyway
                found += check_unused(without(data, ignored), used, where)
    return found
