"""Packing: which conversations share a record."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over records of ``capacity`` tokens by greedy best fit.

    Each item, in the given order, goes to the record with the least space that still holds it. Returns the
    item indices of each record; every item is in exactly one. ValueError for an item that fits no record.
    """
    records: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free tokens -> records with just that many
    spaces: list[int] = []  # the keys of by_space, sorted
    for item, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"item {item} has {length} tokens; a record holds 1 to {capacity}")
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
