"""Encoded data on the disk, between reading and packing, so that memory does not grow with the corpus.

Items go into buckets at random while they are read; later each bucket, small enough for memory, is shuffled
and packed. That is a uniform shuffle of the whole corpus. A segment holds some 32 MB of text, sorted by
bucket; its ``.json``, written last, makes it valid, and is where an interrupted run goes on.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from research.telechat2.common.files import atomic_write, write_json
from research.telechat2.data.encoding import EXAMPLES, Counts, Encoded, Problem, new_counts
from research.telechat2.text.vocabulary import IdArray, TokenArray

SEGMENT_BATCHES = 32
BUCKET_TOKENS = 16 << 20
_TOKENS_PER_BYTE = 0.25  # about, and at most, for mixed Chinese and English
_BUCKET_STREAM = 2  # of random numbers
_Number = TypeVar("_Number", bound=np.generic)
_Places = npt.NDArray[np.int64]


class Totals(NamedTuple):
    """What became of all lines so far."""

    counts: Counts
    problems: list[Problem]

    def add(self, counts: Mapping[str, Mapping[str, int]], problems: Iterable[Iterable[Any]]) -> None:
        """Add those of a batch or segment; of each reason the first EXAMPLES problems are kept."""
        for name, counter in counts.items():
            self.counts[name].update(counter)
        kept = Counter(problem.reason for problem in self.problems)
        for problem in map(Problem._make, problems):
            if kept[problem.reason] < EXAMPLES:
                self.problems.append(problem)
                kept[problem.reason] += 1


class Window(NamedTuple):
    """Some items of a bucket; see ``Encoded``."""

    tokens: TokenArray
    lengths: IdArray
    places: _Places


class Spool:
    """Segments in ``folder``, for texts of about ``text_bytes`` in all."""

    def __init__(self, folder: Path, text_bytes: float, seed: int):
        self.folder = folder
        self.seed = seed
        self.buckets = max(1, round(text_bytes * _TOKENS_PER_BYTE / BUCKET_TOKENS))
        self._shares: list[tuple[_Places, _Places]] = []  # of each segment: items and tokens per bucket

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return len(self._shares)

    def reopen(self) -> Totals:
        """Find the segments of an interrupted run; return what they hold."""
        totals = Totals(new_counts(), [])
        while (path := self._path(self.segments, "json")).is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            totals.add(content["counts"], content["problems"])
            self._shares.append((np.array(content["items"]), np.array(content["tokens"])))
        return totals

    def write(self, batches: list[Encoded]) -> Totals:
        """Write the next segment; return what it holds."""
        totals = Totals(new_counts(), [])
        for batch in batches:
            totals.add(batch.counts, batch.problems)
        tokens = np.concatenate([batch.tokens for batch in batches])
        lengths = np.concatenate([batch.lengths for batch in batches])
        copies = np.concatenate([batch.copies for batch in batches])
        places = np.concatenate([batch.places for batch in batches])
        taken = np.repeat(np.arange(len(lengths)), copies)  # items, once for each copy
        bucket = np.random.default_rng([self.seed, _BUCKET_STREAM, self.segments]).integers(
            self.buckets, size=len(taken)
        )
        items = np.bincount(bucket, minlength=self.buckets)
        sizes = np.bincount(bucket, weights=abs(lengths[taken]), minlength=self.buckets).astype(np.int64)
        order = taken[np.argsort(bucket, kind="stable")]
        starts = starts_of(lengths).tolist()
        with atomic_write(self._path(self.segments, "tokens")) as temporary, open(temporary, "wb") as file:
            # one by one: in memory, the copies would take as many times the space as the weight says
            file.writelines(tokens[starts[i] : starts[i + 1]].data for i in order.tolist())
        for name, values in (("lengths", lengths), ("places", places)):
            with atomic_write(self._path(self.segments, name)) as temporary:
                values[order].tofile(temporary)
        write_json(
            self._path(self.segments, "json"),
            {**totals._asdict(), "items": items.tolist(), "tokens": sizes.tolist()},
        )
        self._shares.append((items, sizes))
        return totals

    def windows(self, bucket: int) -> Iterator[Window]:
        """Yield the items of a bucket, some BUCKET_TOKENS at a time."""
        kept: list[Window] = []
        size = 0
        for segment, (items, sizes) in enumerate(self._shares):
            kept.append(
                Window(
                    self._read(segment, "tokens", np.uint32, sizes, bucket),
                    self._read(segment, "lengths", np.int32, items, bucket),
                    self._read(segment, "places", np.int64, items, bucket),
                )
            )
            size += len(kept[-1].tokens)
            if size >= BUCKET_TOKENS:
                yield _merged(kept)
                kept, size = [], 0
        if size:
            yield _merged(kept)

    def _read(
        self, segment: int, name: str, dtype: type[_Number], shares: _Places, bucket: int
    ) -> npt.NDArray[_Number]:
        offset = int(shares[:bucket].sum()) * np.dtype(dtype).itemsize
        return np.fromfile(self._path(segment, name), dtype, count=int(shares[bucket]), offset=offset)

    def _path(self, segment: int, suffix: str) -> Path:
        return self.folder / f"segment-{segment:06}.{suffix}"


def starts_of(lengths: IdArray) -> _Places:
    """Where each item begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(abs(lengths), dtype=np.int64)])


def _merged(kept: Sequence[Window]) -> Window:
    return Window(*(np.concatenate(arrays) for arrays in zip(*kept, strict=True)))
