"""TelechatPerplexity: the oracle's loss by token, whatever the batches."""

import math

import numpy as np
import pytest
import torch
from mindspore import Tensor
from model_fixtures import RandomModel, int32

from research.telechat2.telechat_metric import TelechatPerplexity

SIZES = {"n_layer": 2, "hidden_size": 32, "n_head": 4, "num_key_value_heads": 2, "ffn_hidden_size": 64}
IGNORED = -100


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return RandomModel(tmp_path_factory.mktemp("model"), vocab_size=160, **SIZES)


def records() -> tuple[np.ndarray, np.ndarray]:
    """Four records of 13 ids with 12, 1, 0 and 7 trained tokens."""
    ids = np.random.default_rng(0).integers(4, 160, (4, 13)).astype(np.int32)
    labels = np.full_like(ids, IGNORED)
    for row, trained in enumerate((12, 1, 0, 7)):
        labels[row, 13 - trained :] = ids[row, 13 - trained :]
    return ids, labels


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_is_the_oracles_mean_over_tokens(model, batch_size):
    ids, labels = records()
    with torch.no_grad():
        logits = model.oracle(torch.tensor(ids, dtype=torch.long)).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(labels[:, 1:], dtype=torch.long).flatten(), ignore_index=IGNORED
    ).item()
    ours = model.build(seq_length=12)
    metric = TelechatPerplexity()
    for start in range(0, len(ids), batch_size):
        batch = slice(start, start + batch_size)
        metric.update(*ours(int32(ids[batch]), int32(labels[batch])))
    found = metric.eval()
    assert found["tokens"] == 20
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["PPL"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert TelechatPerplexity.latest == found


def test_rows_beyond_one_chunk_and_large_logits_count():
    """Two thirds of 600 equal logits of 1e4: the loss is log 600 exactly, with no overflow."""
    tokens = np.zeros((1, 601), np.int32)
    mask = (np.arange(601) % 3 > 0).astype(np.float32)[None]
    metric = TelechatPerplexity()
    metric.update(Tensor(np.full((1, 601, 600), 1e4, np.float32)), Tensor(tokens), Tensor(mask))
    assert metric.eval() == {
        "loss": pytest.approx(math.log(600), abs=1e-12), "PPL": pytest.approx(600), "tokens": 400
    }  # fmt: skip


def test_data_without_trained_tokens_has_no_loss():
    metric = TelechatPerplexity()
    metric.update(np.zeros((1, 3, 5)), np.zeros((1, 3), np.int32), np.array([[1, 0, 0]]))
    with pytest.raises(ValueError, match="hold no trained token"):
        metric.eval()
