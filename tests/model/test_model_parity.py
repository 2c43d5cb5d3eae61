"""The model against the independent oracle, weights going through the project's own converter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_fixtures import RandomModel, assert_same_gradients, int32, loss_and_gradients
from oracle import llama_gradients, load_llama

SEQ_LENGTH, BATCH, VOCAB, PAD = 32, 2, 256, 3
# heads, key/value heads, head_dim, tied, eps: every kind of attention with every head_dim
CASES = {
    "mha-64": (2, None, 64, False, 1e-5),
    "gqa-64-tied": (4, 2, 64, True, 1e-8),
    "mqa-64": (4, 1, 64, False, 1e-8),
    "mha-128-tied": (2, None, 128, True, 1e-5),
    "gqa-128": (4, 2, 128, False, 1e-8),
    "mqa-128-tied": (2, 1, 128, True, 1e-8),
    "mha-160": (2, None, 160, False, 1e-5),
    "gqa-160-tied": (4, 2, 160, True, 1e-5),
    "mqa-160": (2, 1, 160, False, 1e-5),
}


def random_model(folder, heads, kv_heads, head_dim, tied, eps, seed=0, **more):
    kv = {} if kv_heads is None else {"num_key_value_heads": kv_heads}
    return RandomModel(
        folder, seed=seed, tied=tied, hidden_size=heads * head_dim, n_head=heads, n_layer=2, **kv,
        ffn_hidden_size=heads * head_dim * 3 // 2, vocab_size=VOCAB, layer_norm_epsilon=eps, **more,
    )  # fmt: skip


def records(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids ``[BATCH, SEQ_LENGTH + 1]`` and labels of which a part that differs by row is ignored."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, VOCAB, (BATCH, SEQ_LENGTH + 1))
    labels = ids.copy()
    labels[0, :20] = -100
    labels[1, rng.random(SEQ_LENGTH + 1) < 0.3] = -100
    return ids, labels


def oracle_loss(oracle, ids, labels) -> torch.Tensor:
    return oracle(torch.tensor(ids), labels=torch.tensor(labels)).loss


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request, tmp_path_factory):
    """One model as ours and as the oracle, with what both make of the same records."""
    random = random_model(tmp_path_factory.mktemp("model"), *request.param)
    ids, labels = records(seed=1)
    model = random.build(seq_length=SEQ_LENGTH)
    logits, tokens, mask = model(int32(ids))
    total, count = (part.item() for part in model(int32(ids), int32(labels)))
    loss, gradients = loss_and_gradients(model)(ids, labels)
    expected = oracle_loss(random.oracle, ids, labels)
    expected.backward()
    return SimpleNamespace(
        random=random, ids=ids, labels=labels, loss=loss, gradients=gradients, expected=expected.item(),
        logits=logits.asnumpy(), tokens=tokens.asnumpy(), mask=mask.asnumpy(), total=total, count=count,
    )  # fmt: skip


def test_logits_equal_the_oracles(pair):
    with torch.no_grad():
        expected = pair.random.oracle(torch.tensor(pair.ids)).logits.numpy()
    assert 0.9 < expected.std() < 1.1  # the tolerance is meant for logits of about this size
    assert pair.logits.dtype == np.float32
    np.testing.assert_allclose(pair.logits, expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(pair.tokens, pair.ids)
    np.testing.assert_array_equal(pair.mask, pair.ids != PAD)


def test_loss_equals_the_oracles(pair):
    assert pair.loss.shape == (1,)
    np.testing.assert_allclose(pair.loss[0], pair.expected, rtol=1e-5)


def test_evaluation_adds_up_the_oracles_loss_and_counts_its_tokens(pair):
    trained = np.count_nonzero(pair.labels[:, 1:] != -100)
    assert pair.count == trained
    np.testing.assert_allclose(pair.total, pair.expected * trained, rtol=1e-5)


def test_every_gradient_equals_the_oracles(pair):
    assert_same_gradients(pair.gradients, llama_gradients(pair.random.oracle, pair.random.sizes))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("small"), *CASES["gqa-64-tied"], seed=2)


@pytest.mark.parametrize("pad_token_id", [PAD, -1])
def test_without_labels_all_but_padding_is_trained(small, pad_token_id):
    ids, _ = records(seed=3)
    ids[0, 11:], ids[1, -1] = PAD, PAD
    ids[1, 5] = PAD  # in the middle of a text: as a target it is padding, as a context it is read
    labels = np.where(ids == pad_token_id, -100, ids)
    small.oracle.zero_grad()
    expected = oracle_loss(small.oracle, ids, labels)
    expected.backward()
    model = small.build(seq_length=SEQ_LENGTH, pad_token_id=pad_token_id)
    loss, gradients = loss_and_gradients(model)(ids)
    np.testing.assert_allclose(loss[0], expected.item(), rtol=1e-5)
    assert_same_gradients(gradients, llama_gradients(small.oracle, small.sizes))


def test_labels_decide_over_padding_and_may_differ_from_the_inputs(small):
    """Labels are targets of their own: a padding id that is labelled is trained."""
    ids, labels = records(seed=4)
    ids[0, 25:] = PAD
    labels[0, 25:28] = [PAD, 17, 18]
    model = small.build(seq_length=SEQ_LENGTH, ignore_token_id=-1)
    found, _ = loss_and_gradients(model)(ids, np.where(labels == -100, -1, labels))
    with torch.no_grad():
        np.testing.assert_allclose(found[0], oracle_loss(small.oracle, ids, labels).item(), rtol=1e-5)


def test_a_batch_with_no_trained_token_costs_nothing_and_changes_nothing(small):
    ids, labels = records(seed=5)
    labels[:] = -100
    labels[:, 0] = ids[:, 0]  # the first token of a record is never a target
    loss, gradients = loss_and_gradients(small.build(seq_length=SEQ_LENGTH))(ids, labels)
    assert loss == 0.0
    assert all(np.all(grad == 0.0) for grad in gradients.values())


def test_loss_as_numerator_and_denominator(small):
    """What MindFormers accumulates over micro-batches whose counts differ."""
    ids, labels = records(seed=6)
    model = small.build(seq_length=SEQ_LENGTH, calculate_per_token_loss=True).set_train(True)
    numerator, denominator = (part.asnumpy() for part in model(int32(ids), int32(labels)))
    trained = np.count_nonzero(labels[:, 1:] != -100)
    np.testing.assert_allclose(denominator, [trained], rtol=1e-6)
    with torch.no_grad():
        expected = oracle_loss(small.oracle, ids, labels).item() * trained
    np.testing.assert_allclose(numerator, [expected], rtol=1e-5)


def test_rope_theta_is_the_configs(small):
    ids, _ = records(seed=7)
    with torch.no_grad():
        expected = load_llama(small.hf, rope_theta=500.0)(torch.tensor(ids)).logits.numpy()
    logits = small.build(seq_length=SEQ_LENGTH, theta=500.0)(int32(ids))[0].asnumpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_rms_norm_eps_is_the_configs(tmp_path):
    """One so large that it counts."""
    random = random_model(tmp_path, 2, 1, 64, False, 0.5)
    ids, _ = records(seed=10)
    with torch.no_grad():
        expected = random.oracle(torch.tensor(ids)).logits.numpy()
    logits = random.build(seq_length=SEQ_LENGTH)(int32(ids))[0].asnumpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
