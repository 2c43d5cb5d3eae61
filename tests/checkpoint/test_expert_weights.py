"""The mixture of experts in either direction: a tensor for each expert in torch, one stack in MindSpore."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_of_both_ways
from oracle import stored_tensors, write_hf_folder
from refusal import refused
from safetensors.numpy import load_file, save_file

from research.telechat2.checkpoint.convert import (
    convert_to_mindspore,
    convert_to_torch,
    read_mindspore_tensors,
)
from research.telechat2.checkpoint.storage import tensor as stored
from research.telechat2.checkpoint.storage.tensor import StoredTensor, blocks_of
from research.telechat2.checkpoint.storage.views import cut, join

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "ffn_hidden_size": 40}
MANY = MOE | {"num_experts": 11, "n_layer": 3}  # more than ten: experts 10 and 2 sort by number, not by text

SQUARE = MOE | {"num_experts": 16, "ffn_hidden_size": 64}  # each expert as wide as the hidden size


def as_stacks(hf) -> dict[str, np.ndarray]:
    """The MindSpore side's expert tensors, stacked by NumPy from the oracle's folder."""
    tensors, config = load_file(hf / "model.safetensors"), json.loads((hf / "config.json").read_text())
    stacks = {}
    for layer in range(config["n_layer"]):
        there, here = f"transformer.h.{layer}.mlp", f"model.layers.{layer}.feed_forward"

        def experts(leaf, there=there):
            return [
                tensors[f"{there}.local_experts.{expert}.{leaf}"] for expert in range(config["num_experts"])
            ]

        stacks |= {
            f"{here}.router.dense.weight": tensors[f"{there}.router.weight"],
            f"{here}.ffn.w1.weight": np.stack(experts("gate_proj.weight")),
            f"{here}.ffn.w3.weight": np.stack(experts("up_proj.weight")),
            f"{here}.ffn.w2.weight": np.stack(experts("down_proj.weight")),
            f"{here}.ffn.w2.bias": np.stack(experts("down_proj.bias"))[None, :, None, :],
        }
    return stacks


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "inferred"])
@pytest.mark.parametrize("sizes", [MOE, MANY, SQUARE], ids=["4", "11", "square"])
def test_there_and_back(tmp_path, sizes, with_config, dtype):
    write_hf_folder(tmp_path / "hf", sizes, seed=1, dtype=dtype, shards=3)
    if not with_config:
        (tmp_path / "hf" / "config.json").unlink()
    there = convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    back = convert_to_torch(tmp_path / "ms", tmp_path / "back")

    before = stored_tensors(tmp_path / "hf")
    assert stored_tensors(tmp_path / "back") == before
    layers = sizes.get("n_layer", 2)
    assert there.tensors == layers * (6 + 5) + 3
    assert back.tensors == len(before) == layers * (6 + 1 + 4 * sizes["num_experts"]) + 3
    assert there.parameters == back.parameters == sum(int(np.prod(shape)) for _, shape, _ in before.values())
    assert there.bytes == back.bytes == sum(len(data) for _, _, data in before.values())
    assert f"{sizes['num_experts']} experts of feed-forward size {sizes['ffn_hidden_size']}" in str(there)
    assert {file.name for file in there.sources} == {
        file.name for file in (tmp_path / "hf").glob("*.safetensors")
    }
    assert there.ignored == back.ignored == {}


def test_stacks_are_those_of_numpy(tmp_path):
    """Published names and shapes; the same arrays through the file, and through the model's loader."""
    write_hf_folder(tmp_path / "hf", MANY, seed=2)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms.safetensors")
    expected = as_stacks(tmp_path / "hf")
    assert expected["model.layers.2.feed_forward.ffn.w2.bias"].shape == (1, 11, 1, 64)
    for arrays in (load_file(tmp_path / "ms.safetensors"), dict(read_mindspore_tensors(tmp_path))):
        found = {name: array for name, array in arrays.items() if ".feed_forward." in name}
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].shape == array.shape and found[name].tobytes() == array.tobytes(), name
    assert len(arrays) == 3 * 11 + 3  # attention, norms, embeddings are there as well


def test_through_ckpt_and_bin(tmp_path):
    write_hf_folder(tmp_path / "hf", MOE, seed=3, dtype="bfloat16")
    convert_to_mindspore(tmp_path / "hf", tmp_path / "a" / "telechat.ckpt")
    convert_to_torch(tmp_path / "a" / "telechat.ckpt", tmp_path / "b" / "pytorch_model.bin")
    convert_to_mindspore(tmp_path / "b", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


def test_mindspore_loads_the_stacks(tmp_path):
    import mindspore

    write_hf_folder(tmp_path / "hf", MOE, seed=4)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms.safetensors")
    loaded = mindspore.load_checkpoint(str(tmp_path / "ms.safetensors"), format="safetensors")
    for name, array in as_stacks(tmp_path / "hf").items():
        assert np.array_equal(loaded[name].asnumpy(), array)


def test_casts_cross_from_expert_to_expert(tmp_path, monkeypatch):
    """Blocks of 1 KiB, experts of 10 KiB and biases of 256 bytes."""
    import torch
    from safetensors.torch import load_file as load_torch

    for module in (stored, "research.telechat2.checkpoint.storage.safetensors_format"):
        target = f"{module}.BLOCK_BYTES" if isinstance(module, str) else f"{module.__name__}.BLOCK_BYTES"
        monkeypatch.setattr(target, 1 << 10)
    write_hf_folder(tmp_path / "hf", MOE, seed=5)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms", dtype="bfloat16")
    convert_to_torch(tmp_path / "ms", tmp_path / "back", dtype="float32")
    expected = {
        name: tensor.to(torch.bfloat16).float().numpy().tobytes()
        for name, tensor in load_torch(tmp_path / "hf" / "model.safetensors").items()
    }
    assert {name: data for name, (_, _, data) in stored_tensors(tmp_path / "back").items()} == expected


def test_shards_on_the_way_back(tmp_path):
    write_hf_folder(tmp_path / "hf", MOE, seed=6)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    # a stack is 40,960 bytes, an expert a quarter
    summary = convert_to_torch(tmp_path / "ms", tmp_path / "back", max_shard_size=50_000)
    assert len(summary.files) > 5
    assert all(
        sum(len(data) for _, _, data in stored_tensors(file).values()) <= 50_000 for file in summary.files
    )
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    before = stored_tensors(tmp_path / "hf")
    assert index["weight_map"].keys() == before.keys()
    assert stored_tensors(tmp_path / "back") == before


def test_memory_does_not_grow_with_the_experts(tmp_path):
    """Stacks of 80 MB and experts of 20 MB pass through blocks of 16 MiB."""
    sizes = {"n_layer": 1, "hidden_size": 512, "ffn_hidden_size": 10_240, "num_experts": 4}
    write_hf_folder(tmp_path / "hf", sizes, seed=7)
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 240e6
    # One block: that of one expert is gone before the next one's is read.
    assert peak_of_both_ways(tmp_path) < 20e6
    for name in ("hf", "back"):
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    assert load_file(tmp_path / "hf.safetensors").keys() == load_file(tmp_path / "back.safetensors").keys()
    back = load_file(tmp_path / "back.safetensors")
    assert all(
        np.array_equal(array, back[name]) for name, array in load_file(tmp_path / "hf.safetensors").items()
    )


tensors_of_bytes = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@given(counts=tensors_of_bytes, data=st.data())
def test_any_range_of_a_join_and_of_its_cuts(counts, data):
    """A join's bytes are its parts' one after the other; cuts of a join, and joins of cuts, are the same."""
    content = np.arange(sum(counts), dtype=np.uint16).tobytes()
    whole = StoredTensor("whole", "float16", (sum(counts),), None, lambda *at: blocks_of(content, *at))
    parts = cut(whole, [(count,) for count in counts])
    ends = np.cumsum([0, *counts]) * 2
    for part, start, stop in zip(parts, ends, ends[1:], strict=False):
        assert b"".join(part.blocks()) == content[start:stop] == bytes(part.read("float16"))
    again = join(parts, "again", (1, sum(counts)))
    assert b"".join(again.blocks()) == content
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, len(content)))
    assert b"".join(again.blocks(start, stop)) == content[start:stop]
    assert b"".join(again.blocks(start)) == content[start:]
    for part, (begin, end) in zip(
        cut(again, [(n,) for n in counts]), zip(ends, ends[1:], strict=False), strict=True
    ):
        assert b"".join(part.blocks()) == content[begin:end]
        inside = data.draw(st.integers(0, end - begin))
        assert b"".join(part.blocks(inside)) == content[begin + inside : end]
        assert b"".join(part.blocks(0, inside)) == content[begin : begin + inside]


def test_routing_statistics_and_zero_router_biases_are_left_out(tmp_path):
    write_hf_folder(tmp_path / "hf", MOE, seed=8)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms.safetensors")
    block = "model.layers.{}.feed_forward"
    extra = {
        f"{block.format(layer)}.{name}": array
        for layer in range(2)
        for name, array in {
            "expert_load": np.full(4, 0.25, np.float32),
            "drop_rate": np.ones(1, np.float32),
            "router.router.topk_bias": np.zeros(4, np.float32),
            "router.e_score_correction_bias": np.zeros(4, np.float32),
        }.items()
    }
    extra["adam_m.model.layers.0.feed_forward.ffn.w1.weight"] = np.ones((4, 40, 64), np.float32)
    weights = load_file(tmp_path / "ms.safetensors")
    (tmp_path / "trained").mkdir()
    file = tmp_path / "trained" / "model.safetensors"
    save_file(weights | extra, file)
    summary = convert_to_torch(file, tmp_path / "back")
    assert summary.ignored == {
        "routing statistics": 4,
        "all-zero router biases": 4,
        "optimizer states": 1,
    }
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")
    assert dict(read_mindspore_tensors(file)).keys() == weights.keys()

    extra["model.layers.1.feed_forward.router.router.topk_bias"][3] = 1e-30
    save_file(weights | extra, file)
    with refused("model.layers.1.feed_forward.router.router.topk_bias"):
        convert_to_torch(file, tmp_path / "back2")
    extra = {"model.layers.0.feed_forward.expert_loads": np.ones(4, np.float32)}
    save_file(weights | extra, file)
    with refused("1 unknown", "model.layers.0.feed_forward.expert_loads"):
        convert_to_torch(file, tmp_path / "back2")
