"""Packing: which conversations share a record, and how texts are split over records."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

from research.telechat2.data.spool import starts_of
from research.telechat2.text.vocabulary import IdArray, TokenArray


def records(
    tokens: TokenArray, lengths: IdArray, capacity: int, rng: np.random.Generator
) -> Iterator[list[TokenArray]]:
    """Yield the tokens of each record, as the pieces that fill it from the left, in random order.

    ``lengths`` are those of the items in ``tokens``; negative ones are texts. These are put one behind the
    other and split: a record begins with the last token of the one before, which only there can predict the
    next, so every token is trained once. Conversations are whole, and packed by best fit, the longest first,
    which leaves the least over; within a record their order is random.
    """
    starts = starts_of(lengths).tolist()
    order = rng.permutation(len(lengths))

    def item(index: int) -> TokenArray:
        return tokens[starts[index] : starts[index + 1]]

    texts = [item(i) for i in order[lengths[order] < 0].tolist()]
    stream = np.concatenate(texts) if texts else tokens[:0]
    conversations = order[lengths[order] > 0]
    by_length = conversations[np.argsort(-lengths[conversations], kind="stable")].tolist()
    rank = np.empty(len(lengths), np.int64)
    rank[order] = np.arange(len(lengths))
    packed = pack(lengths[by_length].tolist(), capacity)
    splits = range(0, max(len(stream) - 1, 0), capacity - 1)
    for number in rng.permutation(len(packed) + len(splits)).tolist():
        if number < len(packed):
            yield [item(i) for i in sorted((by_length[i] for i in packed[number]), key=rank.__getitem__)]
        else:
            at = splits[number - len(packed)]
            yield [stream[at : at + capacity]]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over records of ``capacity`` tokens by greedy best fit.

    Each item, in the given order, goes to the record with the least space that still holds it. Returns the
    item indices of each record; every item is in exactly one. No item is longer than ``capacity``.
    """
    records: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free tokens -> records with just that many
    spaces: list[int] = []  # the keys of by_space, sorted
    for item, length in enumerate(lengths):
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            record = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        else:
            space, record = capacity, len(records)
            records.append([])
        records[record].append(item)
        left = space - length
        if left:
            if left not in by_space:
                by_space[left] = []
                insort(spaces, left)
            by_space[left].append(record)
    return records
