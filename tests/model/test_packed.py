"""Packed records: with document_start_ids a record gives the logits and the loss of its documents alone."""

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms  # noqa: E402
from refusal import refused

from research.telechat2.telechat import TelechatForCausalLM  # noqa: E402
from research.telechat2.telechat_config import TelechatConfig  # noqa: E402

VOCAB, START, SYSTEM = 128, 1, 6


@pytest.fixture(scope="module")
def model():
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", jit_config={"jit_level": "O0"})
    ms.set_seed(3)
    return TelechatForCausalLM(
        TelechatConfig(
            hidden_size=64, num_layers=2, num_heads=4, n_kv_heads=2, intermediate_size=96, vocab_size=VOCAB,
            seq_length=40, sigma=0.3, compute_dtype="float32", document_start_ids=[START, SYSTEM],
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [
        np.r_[first, rng.integers(7, VOCAB, n)].astype(np.int32) for first, n in ((6, 15), (1, 8), (6, 12))
    ]


def logits_of(model, ids):
    model.set_train(False)
    return model(ms.Tensor(ids[None]))[0].asnumpy()[0]


def test_packed_logits_are_those_of_each_document_alone(model, documents):
    packed = logits_of(model, np.concatenate(documents))
    alone = np.concatenate([logits_of(model, ids) for ids in documents])
    assert packed.std() > 0.01, "logits without spread would agree whatever the mask"
    np.testing.assert_allclose(packed, alone, atol=2e-5)


def test_without_start_ids_a_document_sees_the_one_before(model, documents):
    config = TelechatConfig(**{**model.config.to_dict(), "document_start_ids": []})
    causal = TelechatForCausalLM(config)
    ms.load_param_into_net(causal, model.parameters_dict())
    packed = logits_of(causal, np.concatenate(documents))
    second = slice(len(documents[0]), len(documents[0]) + len(documents[1]))
    assert np.abs(packed[second] - logits_of(model, documents[1])).max() > 1e-3


def test_packed_loss_is_the_token_weighted_mean_of_the_documents(model, documents):
    labels = []
    for ids, untrained in zip(documents, (10, 2, 12), strict=True):
        label = ids.copy()
        label[: untrained + 1] = -100
        labels.append(label)
    model.set_train(True)
    alone = [
        model(ms.Tensor(i[None]), ms.Tensor(y[None])).asnumpy()[0]
        for i, y in zip(documents, labels, strict=True)
    ]
    weights = [(y[1:] != -100).sum() for y in labels]
    packed = model(ms.Tensor(np.concatenate(documents)[None]), ms.Tensor(np.concatenate(labels)[None]))
    assert packed.asnumpy()[0] == pytest.approx(np.average(alone, weights=weights), rel=1e-6)


@pytest.mark.parametrize("ids", ([128], [-1]))
def test_a_start_id_outside_the_vocabulary_is_refused(ids):
    with refused("document_start_ids", ids[0]):
        TelechatConfig(vocab_size=VOCAB, document_start_ids=ids)
