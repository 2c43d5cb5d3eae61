"""Packing: each conversation in exactly one record, none overfull, best fit, brim-full records possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.telechat2.data.packing import pack

lengths = st.lists(st.integers(1, 50), max_size=60)


def best_fit(lengths, capacity):
    """The definition, with a search over all records."""
    records, free = [], []
    for item, length in enumerate(lengths):
        fitting = [r for r in range(len(records)) if free[r] >= length]
        if fitting:
            chosen = min(fitting, key=free.__getitem__)
        else:
            chosen = len(records)
            records.append([])
            free.append(capacity)
        records[chosen].append(item)
        free[chosen] -= length
    return sorted(free)


@given(lengths)
def test_every_item_is_packed_once_and_fits(lengths):
    records = pack(lengths, 50)
    assert sorted(item for record in records for item in record) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in record) <= 50 for record in records)


@given(lengths)
def test_it_is_best_fit(lengths):
    left = sorted(50 - sum(lengths[i] for i in record) for record in pack(lengths, 50))
    assert left == best_fit(lengths, 50)


def test_a_record_can_be_filled_to_the_brim_and_the_last_one_is_kept():
    assert pack([8, 8, 8], 16) == [[0, 1], [2]]
    assert pack([16], 16) == [[0]]
    assert pack([], 16) == []


def test_an_item_that_fits_no_record_is_an_error():
    for length in (17, 0):
        with pytest.raises(ValueError, match=f"item 1 has {length} tokens; a record holds 1 to 16"):
            pack([3, length], 16)
