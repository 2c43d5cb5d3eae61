"""Packing: each conversation in exactly one record, none overfull, best fit, brim-full records possible."""

import numpy as np
from data_lines import read
from hypothesis import given
from hypothesis import strategies as st

from research.telechat2.data.encoding import TRAINED
from research.telechat2.data.job import Options
from research.telechat2.data.packing import pack, records
from research.telechat2.data.preparing import prepare
from research.telechat2.data.writing import IGNORED_LABEL, fill_record

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


def made_items(lengths) -> np.ndarray:
    """Tokens of items, all different; the first of each is not trained, the others are."""
    tokens = np.arange(sum(map(abs, lengths)), dtype=np.uint32)
    trained = np.full(len(tokens), TRAINED)
    trained[np.cumsum([0, *map(abs, lengths[:-1])])] = 0
    return tokens | trained


@given(
    lengths=st.lists(st.integers(2, 20) | st.integers(-70, -2), min_size=1, max_size=30),
    seed=st.integers(0, 99),
)
def test_conversations_stay_whole_and_texts_are_trained_once_each_token(lengths, seed):
    tokens = made_items(lengths)
    found = list(records(tokens, np.array(lengths, np.int32), 20, np.random.default_rng(seed)))
    assert all(sum(map(len, pieces)) <= 20 for pieces in found)
    starts = np.cumsum([0, *map(abs, lengths)])
    whole = {tuple(tokens[a:b]) for a, b, n in zip(starts, starts[1:], lengths, strict=False) if n > 0}
    split = [piece for pieces in found for piece in pieces if tuple(piece) not in whole]
    assert sum(len(pieces) for pieces in found) - len(split) == len(whole)
    filled = [fill_record(pieces, 20, 10**6) for pieces in found]
    labels = np.concatenate([record["labels"][record["labels"] != IGNORED_LABEL] for record in filled])
    assert sorted(labels) == sorted((tokens & ~TRAINED)[tokens >= TRAINED].tolist())
    # texts fill their records, each of which repeats one token of the one before
    text_tokens = sum(-n for n in lengths if n < 0)
    if text_tokens:
        assert len(split) == -(-(text_tokens - 1) // 19)
        assert sum(map(len, split)) == text_tokens + len(split) - 1


@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=30))
def test_the_longest_first_leaves_less_or_as_much_over(lengths):
    found = list(records(made_items(lengths), np.array(lengths), 20, np.random.default_rng(0)))
    assert len(found) <= -(-11 * sum(lengths) // (9 * 20)) + 2  # the bound of best fit decreasing, loosely


def test_the_released_multi_turn_dialogues_fill_their_records(shared_data, tmp_path):
    result = prepare(shared_data / "demo_multi.jsonl", shared_data / "tokenizer.model", tmp_path, Options())
    counts = result["counts"]
    assert counts["lines"] == counts["conversations"] == 1000
    assert counts["records"] <= -(-counts["tokens"] // 8193) + 1
    assert counts["records"] == len(read(tmp_path / "dataset.mindrecord"))
