"""Names, shapes and numbers of parameters are those of the published checkpoints; fresh ones start right."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters
from model_fixtures import int32

from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

VOCAB = 131072
# layers, hidden, heads, key/value heads, feed-forward, vocabulary, tied; parameters as published
RELEASES = {
    "3B": (24, 3072, 24, None, 6144, VOCAB, False, 3_070_528_512),
    "7B": (30, 4096, 32, None, 12288, VOCAB, False, 7_617_351_680),
    "35B": (64, 6144, 48, None, 20480, VOCAB, False, 35_435_059_200),
    "115B": (96, 8192, 64, 8, 40960, VOCAB, False, 113_282_916_352),
    "v1-7B": (30, 4096, 32, None, 12288, 160256, True, 7_200_018_432),
    "v1-12B": (38, 5120, 32, None, 12288, 120000, False, 12_386_432_000),
}


def build(**settings) -> TelechatForCausalLM:
    """A model whose parameters have shapes but no memory."""
    with no_init_parameters():
        return TelechatForCausalLM(TelechatConfig(compute_dtype="float32", seq_length=16, **settings))


def sizes_of(name: str, num_layers: int) -> dict:
    _, hidden, heads, kv_heads, width, vocab, tied, _ = RELEASES[name]
    return {
        "num_layers": num_layers, "hidden_size": hidden, "num_heads": heads, "n_kv_heads": kv_heads,
        "intermediate_size": width, "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip


def count(model) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.trainable_params())


@pytest.mark.parametrize("use_past", [True, False])
def test_names_and_shapes_are_those_of_the_published_checkpoints(use_past):
    model = build(
        num_layers=2, hidden_size=48, num_heads=6, n_kv_heads=2, intermediate_size=80, vocab_size=100,
        use_past=use_past,
    )  # fmt: skip
    expected = {
        "model.tok_embeddings.embedding_weight": (100, 48),
        "model.norm_out.weight": (48,),
        "lm_head.weight": (100, 48),
    }
    for i in range(2):
        expected |= {
            f"model.layers.{i}.attention_norm.weight": (48,),
            f"model.layers.{i}.attention.wq.weight": (48, 48),
            f"model.layers.{i}.attention.wk_v.weight": (2 * 2 * 8, 48),
            f"model.layers.{i}.attention.wo.weight": (48, 48),
            f"model.layers.{i}.attention.wo.bias": (48,),
            f"model.layers.{i}.ffn_norm.weight": (48,),
            f"model.layers.{i}.feed_forward.w1.weight": (80, 48),
            f"model.layers.{i}.feed_forward.w3.weight": (80, 48),
            f"model.layers.{i}.feed_forward.w2.weight": (48, 80),
            f"model.layers.{i}.feed_forward.w2.bias": (48,),
        }
    assert {parameter.name: parameter.shape for parameter in model.trainable_params()} == expected
    others = [p.name for p in model.get_parameters() if p.name not in expected]
    assert len(others) == (4 if use_past else 0) and all(name.endswith("_cache") for name in others)


def test_a_tied_head_is_the_embedding():
    settings = {
        "num_layers": 1,
        "hidden_size": 48,
        "num_heads": 6,
        "intermediate_size": 80,
        "vocab_size": 100,
    }
    model = build(**settings, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.tok_embeddings.embedding_weight
    untied = {parameter.name for parameter in build(**settings).trainable_params()}
    assert {parameter.name for parameter in model.trainable_params()} == untied - {"lm_head.weight"}


@pytest.mark.parametrize("name", RELEASES)
def test_parameter_counts_are_those_of_the_releases(name):
    """Built without memory at full width; one layer and two layers give the number for all of them."""
    layers, *_, published = RELEASES[name]
    one, two = (count(build(**sizes_of(name, num_layers))) for num_layers in (1, 2))
    assert one + (layers - 1) * (two - one) == published


def test_the_115b_model_has_the_tensors_of_its_published_index():
    model = build(**sizes_of("115B", 96))
    assert len(model.trainable_params()) == 963
    assert 4 * count(model) == 453_131_665_408  # bytes in fp32


def test_a_fresh_models_loss_is_what_its_initialisation_says():
    """ln V + H * 0.01^2 / 2: the output projection has standard deviation 0.01, its input unit variance."""
    hidden, rows, length = 128, 2, 512
    ms.set_seed(0)
    model = TelechatForCausalLM(
        TelechatConfig(
            num_layers=1, hidden_size=hidden, num_heads=2, intermediate_size=256, vocab_size=VOCAB,
            seq_length=length, compute_dtype="float32", calculate_per_token_loss=True,
        )
    ).set_train(True)  # fmt: skip
    rng = np.random.default_rng(0)
    total = tokens = 0.0
    for _ in range(20):
        ids = rng.integers(0, VOCAB, (rows, length + 1))
        numerator, denominator = model(int32(ids), int32(ids))
        total, tokens = total + float(numerator.asnumpy()[0]), tokens + float(denominator.asnumpy()[0])
    assert tokens >= 16384
    assert abs(total / tokens - (math.log(VOCAB) + hidden * 1e-4 / 2)) <= 0.003


def test_fresh_parameters_have_the_published_spread():
    ms.set_seed(1)
    model = TelechatForCausalLM(
        TelechatConfig(num_layers=1, hidden_size=256, num_heads=2, vocab_size=512, compute_dtype="float32")
    )
    for parameter in model.trainable_params():
        values = parameter.asnumpy()
        if parameter.name.endswith("bias"):
            assert np.all(values == 0), parameter.name
        elif values.ndim == 1:
            assert np.all(values == 1), parameter.name
        else:
            spread = 0.01 if parameter.name == "lm_head.weight" else 0.0048
            assert abs(values.std() / spread - 1) < 0.02, parameter.name
            assert abs(values.mean()) < 4 * spread / math.sqrt(values.size), parameter.name
