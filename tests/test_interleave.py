"""Layers in copies: the numbers of plain layers, and their communication, in twice as many halves."""

import numpy as np
import pytest
from model_fixtures import RandomModel, int32, loss_and_gradients

COPIES = {"fine_grain_interleave": 2, "parallel_config": {"model_parallel": 2}}


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    sizes = {"hidden_size": 128, "n_head": 4, "num_key_value_heads": 2, "n_layer": 3}
    return RandomModel(tmp_path_factory.mktemp("copies"), ffn_hidden_size=192, vocab_size=256, **sizes)


@pytest.mark.parametrize(
    "fields",
    [
        {"sigma": 0.02},
        {
            "document_start_ids": [5],
            "parallel_config": {"model_parallel": 2, "recompute": {"recompute": True}},
        },
    ],
)
def test_copies_change_no_number(random, fields):
    ids = int32(np.random.default_rng(0).integers(4, 256, (2, 17)))
    plain = {**fields, "parallel_config": {}}
    expected = loss_and_gradients(random.build(seq_length=16, **plain))(ids, ids)
    found = loss_and_gradients(random.build(seq_length=16, **COPIES | fields))(ids, ids)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=0, atol=1e-6, err_msg=name)
