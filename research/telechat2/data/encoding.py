"""The work on a batch of lines, done in any process: parse, render, encode; nothing here depends on order.

A token is one uint32: its id, and TRAINED set where the loss counts it.
"""

import gc
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from research.telechat2.common.errors import UsageError
from research.telechat2.data import formats
from research.telechat2.data.conversions import Conversation, Text
from research.telechat2.data.formats import UnusableLine
from research.telechat2.data.job import Options, ignored_fields
from research.telechat2.data.sources import Batch
from research.telechat2.text import chat
from research.telechat2.text.exact_json import JsonObject
from research.telechat2.text.messages import out_of_turn
from research.telechat2.text.vocabulary import MARKERS, TOOL_TAGS, USER, IdArray, TokenArray, Vocabulary

TRAINED = np.uint32(1 << 31)
EXAMPLES = 10  # so many lines are named for each reason
BLANK, UNWEIGHTED = "blank line", "left out by the weight of its file"
SURROGATE = "not valid Unicode: half of a surrogate pair"
_WEIGHT_STREAM = 1  # of random numbers, apart from those of the shuffle
COUNTERS = ("totals", "formats", "prompt_formats", "skipped", "lengths", "unused_fields")
TOO_LONG = "longer than a record of"
NO_ANSWER = "without an answer to train on"
_RESULT = TOOL_TAGS[2]
_MARKER = re.compile("|".join((*MARKERS, *TOOL_TAGS)).encode())


class Problem(NamedTuple):
    """A line that gives no tokens. ``fatal``: the whole run is refused for it."""

    reason: str
    path: str
    line: int
    sentence: str
    fatal: bool
    unit: str = "line"  # or item, of a JSON array


Counts = dict[str, Counter[str]]  # the name of a counter -> what it has counted


def new_counts() -> Counts:
    """Counters of nothing."""
    return {name: Counter() for name in COUNTERS}


class Encoded(NamedTuple):
    """The tokens of a batch, each item once, however often it is taken."""

    tokens: TokenArray
    lengths: IdArray  # tokens of each item; negative for a text, which may be split
    copies: IdArray  # how often each item is taken
    places: npt.NDArray[np.int64]  # where each item was read: see place_of
    counts: Counts
    problems: list[Problem]  # the first EXAMPLES of each reason


_LINE_BITS = 40


def place_of(place: int) -> tuple[int, int]:
    """The number of an item's file, from 0, and its line there, from 1."""
    return place >> _LINE_BITS, place & ((1 << _LINE_BITS) - 1)


class _Item(NamedTuple):
    kind: str
    parsed: Conversation | Text
    runs: list[int]  # indices into the batch's table of special ids and texts
    trained: list[bool]  # of each run
    line: int
    copies: int


class _Table:
    """The special tokens and texts of a batch, each there once: system prompts recur, and line breaks do."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.index: dict[int | bytes, int] = {}
        self.arrays: list[IdArray] = []  # ids of those that are encoded already
        self.with_marker: set[int] = set()  # texts in which special tokens are spelt out
        self.changed: set[int] = set()  # texts that the vocabulary does not give back

    def encode(self) -> None:
        """Encode what has been added."""
        new = list(self.index)[len(self.arrays) :]
        texts = [key for key in new if isinstance(key, bytes)]
        self.with_marker.update(self.index[text] for text in texts if b"<" in text and _MARKER.search(text))
        ids = self.vocabulary.encode_many(texts)
        self.changed.update(self.index[texts[i]] for i in self.vocabulary.changed(texts, ids))
        encoded = iter(ids)
        self.arrays += [next(encoded) if isinstance(key, bytes) else np.array([key], np.int32) for key in new]

    def length(self, runs: list[int]) -> int:
        """Tokens of an item."""
        arrays = self.arrays
        return sum([len(arrays[run]) for run in runs])


class _Problems:
    """The lines of a batch that give no tokens: all are counted, the first of each reason are named."""

    def __init__(self, batch: Batch, options: Options, skipped: Counter[str]):
        self.batch, self.options, self.skipped = batch, options, skipped
        self.named: list[Problem] = []

    def note(self, error: UnusableLine, line: int) -> None:
        self.skipped[error.reason] += 1
        if self.skipped[error.reason] <= EXAMPLES:
            # it may quote half of a surrogate pair, which no file can hold
            sentence = str(error).encode("utf-8", "backslashreplace").decode()
            fatal = _is_fatal(error.reason, self.options)
            self.named.append(
                Problem(error.reason, str(self.batch.path), line, sentence, fatal, self.batch.unit)
            )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A batch makes many objects and no cycles among them; to look for some takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def encode_batch(batch: Batch, vocabulary: Vocabulary, options: Options) -> Encoded:
    """Encode the lines of a batch; each ends in the counts, as an item or by the reason it is none."""
    counts = new_counts()
    counts["totals"]["lines"] = len(batch.lines)
    problems = _Problems(batch, options, counts["skipped"])
    table, ignored, items = _Table(vocabulary), ignored_fields(options.ignore_fields), []
    copies = _copies(batch, options.seed)
    for line, (content, times) in enumerate(zip(batch.lines, copies, strict=True), batch.first_line):
        try:
            item = _parsed(content, line, times, table, options.train_on, ignored)
        except UnusableLine as error:
            problems.note(error, line)
            continue
        items.append(item)
        if item.parsed.unused:
            counts["unused_fields"].update(item.parsed.unused)
    table.encode()
    runs: list[int] = []
    trained: list[bool] = []
    lengths: list[int] = []
    taken: list[int] = []
    places: list[int] = []
    for item in items:
        try:
            fitting, length = _fitting(item, table, options)
        except UnusableLine as error:
            problems.note(error, item.line)
            continue
        counts["totals"]["truncated"] += fitting is not item
        _count(fitting, length, table, counts)
        runs += fitting.runs
        trained += fitting.trained
        lengths.append(-length if isinstance(item.parsed, Text) else length)
        taken.append(item.copies)
        places.append((batch.file << _LINE_BITS) + item.line)
    tokens = _joined([table.arrays[run] for run in runs], trained)
    weights = np.repeat(np.array(taken, np.int64), np.abs(lengths).astype(np.int64))  # of each token
    counts["totals"]["tokens"] = int(weights.sum())
    counts["totals"]["trained_tokens"] = int(weights[tokens >= TRAINED].sum())
    return Encoded(
        tokens,
        np.array(lengths, np.int32),
        np.array(taken, np.int32),
        np.array(places, np.int64),
        counts,
        problems.named,
    )


def _joined(pieces: Sequence[IdArray], trained: list[bool]) -> TokenArray:
    if not pieces:
        return np.zeros(0, np.uint32)
    tokens: TokenArray = np.concatenate(pieces).view(np.uint32)
    flags = np.array(trained, np.uint32) * TRAINED
    return tokens | np.repeat(flags, list(map(len, pieces)))


def _copies(batch: Batch, seed: int) -> list[int]:
    """How often each line is taken: the weight, its fraction by chance."""
    whole, part = divmod(batch.weight, 1)
    if not part:
        return [int(whole)] * len(batch.lines)
    chance = np.random.default_rng([seed, _WEIGHT_STREAM, batch.number]).random(len(batch.lines))
    return [int(whole) + bool(drawn) for drawn in chance < part]


def _is_fatal(reason: str, options: Options) -> bool:
    if reason.startswith(TOO_LONG):
        return options.too_long == "error"
    harmless = (BLANK, UNWEIGHTED, SURROGATE, formats.WEIGHT_0)
    return options.bad_lines == "error" and reason not in harmless


def _parsed(
    content: bytes, line: int, copies: int, table: _Table, train_on: str, ignored: frozenset[str]
) -> _Item:
    text = formats.decode_line(content)
    if not text.strip():
        raise UnusableLine(BLANK, "")
    if not copies:
        raise UnusableLine(UNWEIGHTED, "")
    kind, parsed = formats.parse(text, ignored)
    return _Item(kind, parsed, *_runs(parsed, table, train_on), line, copies)


def _runs(parsed: Conversation | Text, table: _Table, train_on: str) -> tuple[list[int], list[bool]]:
    """Render; return the runs of what is encoded, by their places in the table, and which are trained."""
    index = table.index
    runs, trained = [], []
    try:
        segments = parsed.render(train_on=train_on)
    except (UsageError, RecursionError) as error:
        raise formats.unusable(error) from error
    try:
        for run, is_trained in chat.runs(segments, table.vocabulary.special_ids):
            runs.append(index.setdefault(run.encode() if isinstance(run, str) else run, len(index)))
            trained.append(is_trained)
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise UnusableLine(SURROGATE, f"holds U+{code:04X}, half of a surrogate pair") from error
    if True not in trained[1:]:
        raise UnusableLine(
            NO_ANSWER, "the conversation has no answer to train on; add one or remove the line"
        )
    return runs, trained


def _fitting(item: _Item, table: _Table, options: Options) -> tuple[_Item, int]:
    """The item and its length, or its first turns and theirs where it is too long."""
    length, parsed = table.length(item.runs), item.parsed
    if length <= options.capacity or isinstance(parsed, Text):
        return item, length
    reason = f"{TOO_LONG} {options.capacity} tokens"
    if options.too_long != "truncate":
        raise UnusableLine(reason, f"has {length} tokens, a record holds {options.capacity}")
    messages = _first_turns(parsed, item.runs, table, options.capacity)
    if not chat.trained_answers(messages, options.train_on):
        raise UnusableLine(
            f"{reason} within its first trained turn",
            f"has {length} tokens and no turn border early enough that leaves an answer to train on",
        )
    parsed = parsed._replace(messages=messages)
    runs, trained = _runs(parsed, table, options.train_on)
    table.encode()
    return item._replace(parsed=parsed, runs=runs, trained=trained), table.length(runs)


def _first_turns(parsed: Conversation, runs: list[int], table: _Table, capacity: int) -> list[JsonObject]:
    """As many whole turns of a conversation as fit; a turn begins with a question of the user.

    So it ends neither between a tool call and its result, nor before anything is asked.
    """
    user = table.index[table.vocabulary.special_ids[USER]]
    starts, at = [], 0  # of every <_user>, which the results of tools begin with as well
    for run in runs:
        if run == user:
            starts.append(at)
        at += len(table.arrays[run])
    messages = parsed.messages
    openings = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "user" or (message["role"] == "tool" and messages[i - 1]["role"] != "tool")
    ]
    cut, asked = 0, False
    for opening, start in zip(openings, starts, strict=True):
        message = messages[opening]
        is_user = message["role"] == "user"
        is_result = parsed.tool_tags_in_content and _RESULT in message["content"]  # `dialog` data
        if start <= capacity and asked and is_user and not is_result:
            cut = opening
        asked |= is_user
    return messages[:cut]


def _count(item: _Item, length: int, table: _Table, counts: Counts) -> None:
    totals, parsed = counts["totals"], item.parsed
    totals["copies"] += item.copies - 1
    totals["with_special_text"] += not table.with_marker.isdisjoint(item.runs)
    totals["changed_text"] += not table.changed.isdisjoint(item.runs)
    counts["formats"][item.kind] += 1
    counts["lengths"][str(1 << (length - 1).bit_length())] += 1
    if isinstance(parsed, Text):
        totals["texts"] += 1
    else:
        totals["conversations"] += 1
        totals["out_of_turn"] += out_of_turn(parsed.messages) > 0
        counts["prompt_formats"][parsed.prompt_format] += 1
