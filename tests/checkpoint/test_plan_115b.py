"""The real index of the 115B release against its config: everything is mapped, and the totals are exact."""

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from oracle import hf_shapes
from refusal import refused

from research.telechat2.checkpoint.plan import make_plan
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.checkpoint.table import expand

# n_layer, hidden, ffn, heads, kv heads, vocabulary, tied -> parameters: the published totals of the family
FAMILY = {
    "TeleChat 7B": ((30, 4096, 12288, 32, None, 160256, True), 7_200_018_432),
    "TeleChat 12B": ((38, 5120, 12288, 32, None, 120000, False), 12_386_432_000),
    "TeleChat2 3B": ((24, 3072, 6144, 24, None, 131072, False), 3_070_528_512),
    "TeleChat2 7B": ((30, 4096, 12288, 32, None, 131072, False), 7_617_351_680),
    "TeleChat2 35B": ((64, 6144, 20480, 48, None, 131072, False), 35_435_059_200),
    "TeleChat2 115B": ((96, 8192, 40960, 64, 8, 131072, False), 113_282_916_352),
}
KEYS = ("n_layer", "hidden_size", "ffn_hidden_size", "n_head", "num_key_value_heads", "vocab_size")


def described(shapes: dict[str, tuple[int, ...]], dtype: str = "float32") -> list[StoredTensor]:
    """Tensors without bytes: enough for a plan."""
    return [StoredTensor(name, dtype, shape, Path("shard"), iter) for name, shape in shapes.items()]


def test_the_115b_index(shared_data):
    folder = shared_data / "release_115b"
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shapes = hf_shapes(config)
    tensors = described({name: shapes[name] for name in index["weight_map"]})

    plan = make_plan(tensors, "torch", TelechatSizes.from_hf_config(config), "the 115B release")
    assert len(plan.weights) == 963
    assert plan.ignored == {}
    hidden, ffn, layers, vocab = 8192, 40960, 96, 131072
    per_layer = 2 * hidden**2 + 2 * 8 * 128 * hidden + hidden + 3 * ffn * hidden + hidden + 2 * hidden
    parameters = sum(tensor.size for tensor, _ in plan.weights)
    assert parameters == layers * per_layer + 2 * vocab * hidden + hidden == 113_282_916_352
    total_size = index["metadata"]["total_size"]
    assert sum(tensor.nbytes("float32") for tensor, _ in plan.weights) == total_size == 453_131_665_408

    there = [(StoredTensor(name, "float32", t.shape, t.file, t.blocks)) for t, name in plan.weights]
    back = make_plan(there, "mindspore", None, "the same, converted")
    assert [name for _, name in back.weights] == list(index["weight_map"])
    assert back.sizes.num_layers == 96 and back.sizes.kv_size == 1024


@pytest.mark.parametrize("model", FAMILY)
def test_parameters_of_every_dense_size(model):
    values, parameters = FAMILY[model]
    config = {key: value for key, value in zip(KEYS, values, strict=False) if value is not None}
    config["tie_word_embeddings"] = values[-1]
    sizes = TelechatSizes.from_hf_config(config)
    plan = make_plan(described(hf_shapes(config)), "torch", sizes, model)
    assert sum(tensor.size for tensor, _ in plan.weights) == parameters
    assert len({name for _, name in plan.weights}) == len(plan.weights)  # every target is filled once


def test_the_39b_mixture_of_experts():
    """From the sizes alone, and from tensors that only carry them: 39B-A12B in every count."""
    config = {"n_layer": 30, "hidden_size": 4096, "ffn_hidden_size": 6144, "n_head": 32, "vocab_size": 131072}
    config |= {"num_experts": 16, "tie_word_embeddings": False}
    hidden, ffn = 4096, 6144
    per_layer = 4 * hidden**2 + hidden + 16 * hidden + 16 * (3 * ffn * hidden + hidden) + 2 * hidden
    total = 30 * per_layer + 2 * 131072 * hidden + hidden
    assert per_layer == 1_275_211_776 and total == 39_330_099_200

    sizes = TelechatSizes.from_hf_config(config)
    weights = expand(sizes)
    assert sum(prod(weight.shape) for weight in weights) == total
    shapes = {name: shape for weight in weights for name, shape in weight.torch.items()}
    assert shapes == hf_shapes(config)
    inactive = re.compile(r".*\.local_experts\.([4-9]|1[0-9])\..*")  # of 16 experts, a token meets four
    assert sum(prod(shape) for name, shape in shapes.items() if not inactive.match(name)) == 12_149_534_720

    plan = make_plan(described(hf_shapes(config), "bfloat16"), "torch", sizes, "39B")
    assert len(plan.sources) == 30 * (6 + 1 + 16 * 4) + 3
    assert len(plan.weights) == len({name for _, name in plan.weights}) == 30 * (6 + 5) + 3
    assert sum(tensor.size for tensor, _ in plan.weights) == total
    shapes = {name: tensor.shape for tensor, name in plan.weights}
    assert shapes["model.layers.29.feed_forward.ffn.w1.weight"] == (16, 6144, 4096)
    assert shapes["model.layers.29.feed_forward.ffn.w2.bias"] == (1, 16, 1, 4096)

    back = make_plan(described(shapes), "mindspore", None, "39B, converted")
    assert back.sizes == replace(sizes, num_heads=None, n_kv_heads=None)
    assert {name: tensor.shape for tensor, name in back.weights} == hf_shapes(config)


def test_mindformers_key_names_mean_the_same():
    hf = {"n_layer": 3, "n_head": 8, "hidden_size": 64, "num_key_value_heads": 2, "ffn_hidden_size": 48}
    mindformers = {
        "num_layers": 3,
        "num_heads": 8,
        "hidden_size": 64,
        "n_kv_heads": 2,
        "intermediate_size": 48,
    }
    sizes = TelechatSizes.from_hf_config(hf | {"vocab_size": 10})
    assert sizes == TelechatSizes.from_hf_config(mindformers | {"vocab_size": 10})
    assert sizes.kv_size == 16
    assert TelechatSizes.from_hf_config(hf | {"vocab_size": 10, "num_key_value_heads": None}).kv_size == 64


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"n_layer": None}, ["n_layer", "num_layers"]),
        ({"n_layer": 0}, ["n_layer = 0"]),
        ({"hidden_size": "64"}, ["hidden_size = '64'"]),
        ({"vocab_size": True}, ["vocab_size = True"]),
        ({"n_head": 7}, ["hidden_size = 64", "num_heads = 7"]),
        ({"num_key_value_heads": 3}, ["num_heads = 8", "n_kv_heads = 3"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings = 'yes'"]),
    ],
)
def test_a_config_that_cannot_be(change, values):
    config = {"n_layer": 3, "n_head": 8, "hidden_size": 64, "ffn_hidden_size": 48, "vocab_size": 10}
    with refused(*values):
        TelechatSizes.from_hf_config(config | change)
