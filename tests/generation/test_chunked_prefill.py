"""Prompts read in pieces: the same answers as read at once, whatever the pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_fixtures import RandomModel, generate, oracle_generate, prompts
from refusal import refused
from rope_oracle import with_dynamic_ntk

from research.telechat2.generation.chunked_prefill import pieces
from research.telechat2.telechat_config import TelechatConfig

VOCAB, SEQ_LENGTH = 256, 96
CACHE = {"use_past": True, "block_size": 4, "num_blocks": 80, "seq_length": SEQ_LENGTH}
SIZES = {
    "hidden_size": 128,
    "n_head": 2,
    "num_key_value_heads": 1,
    "ffn_hidden_size": 192,
    "vocab_size": VOCAB,
}
DENSE, MOE = {"n_layer": 2}, {"n_layer": 1, "num_experts": 4, "num_experts_per_tok": 2}


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6), chunk=st.integers(1, 60))
def test_pieces_hold_every_token_once_and_in_order(lengths, chunk):
    steps = pieces(lengths, chunk)
    assert [prefill for prefill, _ in steps] == sorted((prefill for prefill, _ in steps), reverse=True)
    read = [0] * len(lengths)
    for prefill, step in steps:
        assert step and sum(stop - start for _, start, stop in step) <= chunk
        for row, start, stop in step:
            assert start == read[row] < stop and prefill == (start == 0)
            read[row] = stop
    assert read == lengths


@pytest.mark.parametrize("kind", [DENSE, pytest.param(MOE, marks=pytest.mark.slow)], ids=["dense", "moe"])
def test_answers_do_not_depend_on_the_pieces(tmp_path, kind):
    """Prompts below, at and above the size of a piece, one of many pieces, and blocks used again."""
    random = RandomModel(tmp_path, seed=9, **SIZES, **kind)
    model = random.build(**CACHE, prefill_chunk=8)
    for seed, lengths in enumerate([(50, 8, 3, 17), (9,), (61, 30)]):
        rows = prompts(seed, VOCAB, *lengths)
        found = generate(model, rows, max_new_tokens=6)
        assert found == [oracle_generate(random, row, 6) for row in rows]


@pytest.mark.parametrize("by_prompt", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_pieces_of_a_request_have_one_rotary_factor(tmp_path, by_prompt):
    """Beyond the trained length, with the limit that generate knows, and by the prompt alone."""
    random = RandomModel(tmp_path, seed=10, **SIZES, **DENSE)
    ntk = {"extend_method": "DYNAMIC_NTK", "max_position_embedding": 24}
    rows = prompts(4, VOCAB, 60, 22, 5)
    model = random.build(**CACHE, **ntk, prefill_chunk=16, extend_by_prompt=by_prompt)
    for row, found in zip(rows, generate(model, rows, max_new_tokens=8), strict=True):
        oracle = with_dynamic_ntk(random.oracle, len(row) + (0 if by_prompt else 8), 24)
        with torch.no_grad():
            logits = oracle(torch.tensor([found])).logits[0].numpy()
        np.testing.assert_array_equal(found[len(row) :], logits[len(row) - 1 : -1].argmax(-1))


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"prefill_chunk": -1, "use_past": True}, ("prefill_chunk", -1)),
        ({"prefill_chunk": 512}, ("prefill_chunk", 512, "use_past", False)),
        ({"prefill_chunk": 512, "use_past": True, "is_dynamic": False}, ("is_dynamic", False)),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, values):
    with refused(*values):
        TelechatConfig(**fields)
