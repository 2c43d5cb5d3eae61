"""TelechatPerplexity: the oracle's loss by token, whatever the batches."""

import math

import numpy as np
import pytest
import torch
from mindspore import Tensor
from model_fixtures import RandomModel, int32
from refusal import refused

from research.telechat2.run.perplexity import TelechatPerplexity

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


def test_a_batch_hands_two_numbers_to_the_host(model, monkeypatch):
    ids, labels = records()
    outputs = model.build(seq_length=12)(int32(ids), int32(labels))
    handed, original = [], Tensor.asnumpy
    monkeypatch.setattr(
        Tensor, "asnumpy", lambda tensor: handed.append(original(tensor).nbytes) or original(tensor)
    )
    TelechatPerplexity().update(*outputs)
    assert handed == [4, 4]


def test_tokens_are_counted_one_by_one_beyond_what_float32_can_count():
    """2**24 and 1 are 2**24 in float32; so are the losses, one of which is then lost."""
    metric = TelechatPerplexity()
    for tokens in (2**24, 1, 1):
        metric.update(np.float32(2 * tokens), np.float32(tokens))
    assert metric.eval() == {"loss": 2.0, "PPL": pytest.approx(math.exp(2.0)), "tokens": 2**24 + 2}


@pytest.mark.parametrize("total", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(total):
    metric = TelechatPerplexity()
    metric.update(Tensor([3.0]), Tensor([2.0]))
    with refused(total, "2 evaluation batches"):
        metric.update(Tensor([total]), Tensor([2.0]))


def test_a_stage_without_the_losses_has_no_result(capsys):
    """Of a pipeline's stages but the last, the model returns activations."""
    metric = TelechatPerplexity()
    metric.has_losses, metric.last_rank = False, 15
    metric.update(Tensor(np.full((16, 128), np.nan, np.float32)))
    assert metric.eval() == {} and "log of rank 15" in capsys.readouterr().out


def test_data_without_trained_tokens_has_no_loss():
    metric = TelechatPerplexity()
    metric.update(Tensor([0.0]), Tensor([1e-8]))
    with refused("telechat_preprocess.py"):
        metric.eval()


def test_data_without_labels_are_named():
    with refused("eval_dataset.input_columns", "labels"):
        TelechatPerplexity().update(np.zeros((1, 3, 5)), np.zeros((1, 3)), np.zeros((1, 3)))
