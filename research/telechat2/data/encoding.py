"""The work on a batch of lines, done in any process: parse, render, encode; nothing here depends on order.

A token is one uint32: its id, and TRAINED set where the loss counts it.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from research.telechat2 import telechat_chat
from research.telechat2.data import formats
from research.telechat2.data.formats import Conversation, Text, UnusableLine
from research.telechat2.data.sources import Batch
from research.telechat2.data.vocabulary import MARKERS, Vocabulary

TRAINED = np.uint32(1 << 31)
EXAMPLES = 10  # so many lines are named for each reason
BLANK, UNWEIGHTED = "blank line", "left out by the weight of its file"
SURROGATE = "not valid Unicode: half of a surrogate pair"
_WEIGHT_STREAM = 1  # of random numbers, apart from those of the shuffle
COUNTERS = ("totals", "formats", "prompt_formats", "skipped", "lengths")
TOO_LONG = "longer than a record of"
_MARKERS = [marker.encode() for marker in (*MARKERS, *telechat_chat.TOOL_TAGS)]


class Settings(NamedTuple):
    """What decides the tokens of a line, beside the vocabulary."""

    capacity: int  # tokens of a record
    train_on: str = "answers"
    too_long: str = "skip"
    bad_lines: str = "error"
    seed: int = 0


class Problem(NamedTuple):
    """A line that gives no tokens. ``fatal``: the whole run is refused for it."""

    reason: str
    path: str
    line: int
    sentence: str
    fatal: bool


class Encoded(NamedTuple):
    """The tokens of a batch."""

    tokens: np.ndarray  # uint32
    lengths: np.ndarray  # int32, tokens of each item; negative for a text, which may be split
    counts: dict[str, Counter]
    problems: list[Problem]  # the first EXAMPLES of each reason


class _Item(NamedTuple):
    kind: str
    parsed: Conversation | Text
    runs: list[tuple[int | bytes, bool]]
    line: int
    copies: int


def encode_batch(batch: Batch, vocabulary: Vocabulary, settings: Settings) -> Encoded:
    """Encode the lines of a batch; each ends in the counts, as an item or by the reason it is none."""
    counts = {name: Counter() for name in COUNTERS}
    counts["totals"]["lines"] = len(batch.lines)
    problems: dict[str, list[Problem]] = {}

    def note(error: UnusableLine, line: int) -> None:
        counts["skipped"][error.reason] += 1
        found = problems.setdefault(error.reason, [])
        if len(found) < EXAMPLES:
            fatal = _is_fatal(error.reason, settings)
            found.append(Problem(error.reason, str(batch.path), line, str(error), fatal))

    items = []
    for line, (content, copies) in enumerate(
        zip(batch.lines, _copies(batch, settings.seed), strict=True), batch.first_line
    ):
        try:
            items.append(_parsed(content, line, int(copies), vocabulary, settings))
        except UnusableLine as error:
            note(error, line)
    texts = {run for item in items for run, _ in item.runs if isinstance(run, bytes)}
    arrays = vocabulary.encode(texts)
    pieces: list[np.ndarray] = []
    trained: list[bool] = []
    lengths: list[int] = []
    for item in items:
        try:
            runs, length = _fitting(item, arrays, vocabulary, settings)
        except UnusableLine as error:
            note(error, item.line)
            continue
        counts["totals"]["truncated"] += runs is not item.runs
        _count(item, length, counts)
        pieces += [arrays[run] for run, _ in runs] * item.copies
        trained += [is_trained for _, is_trained in runs] * item.copies
        lengths += [-length if isinstance(item.parsed, Text) else length] * item.copies
    tokens = _joined(pieces, trained)
    counts["totals"]["tokens"] = len(tokens)
    counts["totals"]["trained_tokens"] = int((tokens >= TRAINED).sum())
    return Encoded(tokens, np.array(lengths, np.int32), counts, sum(problems.values(), []))


def _joined(pieces: list[np.ndarray], trained: list[bool]) -> np.ndarray:
    if not pieces:
        return np.zeros(0, np.uint32)
    tokens = np.concatenate(pieces).view(np.uint32)
    flags = np.array(trained, np.uint32) * TRAINED
    return tokens | np.repeat(flags, [len(piece) for piece in pieces])


def _copies(batch: Batch, seed: int) -> np.ndarray:
    """How often each line is taken: the weight, its fraction by chance."""
    whole, part = divmod(batch.weight, 1)
    if not part:
        return np.full(len(batch.lines), int(whole))
    chance = np.random.default_rng([seed, _WEIGHT_STREAM, batch.number]).random(len(batch.lines))
    return int(whole) + (chance < part)


def _is_fatal(reason: str, settings: Settings) -> bool:
    if reason.startswith(TOO_LONG):
        return settings.too_long == "error"
    return settings.bad_lines == "error" and reason not in (BLANK, UNWEIGHTED, SURROGATE)


def _parsed(content: bytes, line: int, copies: int, vocabulary: Vocabulary, settings: Settings) -> _Item:
    text = formats.decode_line(content, is_first=line == 1)
    if not text.strip():
        raise UnusableLine(BLANK, "")
    if not copies:
        raise UnusableLine(UNWEIGHTED, "")
    kind, parsed = formats.parse(text)
    return _Item(kind, parsed, _runs(parsed, vocabulary, settings.train_on), line, copies)


def _runs(
    parsed: Conversation | Text, vocabulary: Vocabulary, train_on: str
) -> list[tuple[int | bytes, bool]]:
    """Ids of special tokens and texts in UTF-8, each with whether it is trained."""
    try:
        segments = parsed.render(train_on=train_on)
    except ValueError as error:
        raise UnusableLine("not what its format asks for", error) from error
    runs = []
    for run, trained in telechat_chat.runs(segments, vocabulary.special_id):
        try:
            runs.append((run.encode() if isinstance(run, str) else run, trained))
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise UnusableLine(SURROGATE, f"holds U+{code:04X}, half of a surrogate pair") from error
    if not any(trained for _, trained in runs[1:]):
        raise UnusableLine(
            "without an answer to train on",
            "the conversation has no answer to train on; add one or remove the line",
        )
    return runs


def _fitting(item: _Item, arrays: dict, vocabulary: Vocabulary, settings: Settings) -> tuple[list, int]:
    """The runs of an item and their length, those of its first turns where it is too long."""
    _add_special(item.runs, arrays)
    length = sum(len(arrays[run]) for run, _ in item.runs)
    if length <= settings.capacity or isinstance(item.parsed, Text):
        return item.runs, length
    reason = f"{TOO_LONG} {settings.capacity} tokens"
    if settings.too_long != "truncate":
        raise UnusableLine(reason, f"has {length} tokens, a record holds {settings.capacity}")
    messages = _first_turns(item, arrays, vocabulary, settings.capacity)
    if not messages:
        raise UnusableLine(
            f"{reason} within its first turn", f"has {length} tokens and no turn border early enough"
        )
    runs = _runs(item.parsed._replace(messages=messages), vocabulary, settings.train_on)
    arrays.update(vocabulary.encode({run for run, _ in runs if isinstance(run, bytes)} - arrays.keys()))
    return runs, sum(len(arrays[run]) for run, _ in runs)


def _add_special(runs: Iterable[tuple[int | bytes, bool]], arrays: dict) -> None:
    for run, _ in runs:
        if run not in arrays:
            arrays[run] = np.array([run], np.int32)


def _first_turns(item: _Item, arrays: dict, vocabulary: Vocabulary, capacity: int) -> list[dict]:
    """As many whole turns of a conversation as fit; a turn begins with a question of the user."""
    user = vocabulary.special_id(telechat_chat.USER)
    starts, at = [], 0  # of every <_user>, which the results of tools begin with as well
    for run, _ in item.runs:
        if run == user:
            starts.append(at)
        at += len(arrays[run])
    messages = item.parsed.messages
    openings = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "user" or (message["role"] == "tool" and messages[i - 1]["role"] != "tool")
    ]
    cut = 0
    for opening, start in zip(openings, starts, strict=True):
        if start <= capacity and messages[opening]["role"] == "user":
            cut = opening
    return messages[:cut] if any(m["role"] in ("assistant", "bot") for m in messages[:cut]) else []


def _count(item: _Item, length: int, counts: dict[str, Counter]) -> None:
    is_text = isinstance(item.parsed, Text)
    totals = counts["totals"]
    totals["texts" if is_text else "conversations"] += 1
    totals["copies"] += item.copies - 1
    totals["with_special_text"] += any(
        b"<" in run and any(marker in run for marker in _MARKERS)
        for run, _ in item.runs
        if isinstance(run, bytes)
    )
    counts["formats"][item.kind] += 1
    if not is_text:
        counts["prompt_formats"][item.parsed.prompt_format] += 1
    counts["lengths"][str(1 << (length - 1).bit_length())] += 1
