"""The padding id of a batch is no part of any prompt: answers of shorter rows are those of single ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindformers.generation.text_generator import get_valid_length_each_example
from model_fixtures import RandomModel, oracle_generate, prompts

from research.telechat2.generation.padding import Rows, pad_rows

rows_of_ids = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=5)


@given(rows=rows_of_ids, preferred=st.lists(st.one_of(st.none(), st.integers(-2, 6)), max_size=3))
def test_every_length_is_read_from_the_padded_rows(rows, preferred):
    array, padding = pad_rows(rows, preferred)
    lengths = get_valid_length_each_example(array, padding)[0]
    assert lengths.tolist() == [len(row) for row in rows]
    for row, filled in zip(rows, array, strict=True):
        assert filled[: len(row)].tolist() == row
    usable = [p for p in preferred if p is not None and p >= 0 and p not in {row[-1] for row in rows}]
    assert not usable or padding == usable[0]


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    sizes = {"num_key_value_heads": 2, "vocab_size": 160}
    return RandomModel(tmp_path_factory.mktemp("padding"), seed=3, **sizes)


@pytest.mark.parametrize("padding", [3, 0, -1, 2, None], ids=str)
def test_answers_do_not_depend_on_the_models_padding_id(random, padding):
    """0 (unknown), -1 and none, and that of the end, which one prompt ends with; the oracle pads nothing."""
    settings = {"pad_token_id": padding} if padding is not None else {}
    model = random.build(seq_length=64, use_past=True, num_blocks=32, batch_size=3, **settings)
    rows = [*prompts(4, 160, 9, 3), [5, 6, 2]]
    more = {} if padding is not None else {"pad_token_id": None}
    found = model.generate(Rows(rows), max_new_tokens=6, do_sample=False, eos_token_id=[-1], **more)
    for row, answer in zip(rows, found, strict=True):
        assert np.asarray(answer).tolist() == oracle_generate(random, row, 6)
