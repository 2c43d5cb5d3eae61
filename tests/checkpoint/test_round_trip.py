"""torch -> MindSpore -> torch gives back every tensor: name, dtype, shape and bytes."""

import json

import numpy as np
import pytest
from memory import peak_of_both_ways
from oracle import hf_shapes, stored_tensors, write_hf_folder
from refusal import refused

from research.telechat2.checkpoint import convert
from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch

MHA = {"num_key_value_heads": 4}
GQA = {"num_key_value_heads": 2, "ffn_hidden_size": 88}
HEAD_DIM_160 = {"hidden_size": 320, "n_head": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sizes", [MHA, GQA, HEAD_DIM_160], ids=["mha", "gqa", "head_dim160"])
def test_safetensors(tmp_path, sizes, tied, dtype):
    write_hf_folder(tmp_path / "hf", sizes, seed=1, dtype=dtype, shards=3, tied=tied)
    there = convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    back = convert_to_torch(tmp_path / "ms", tmp_path / "back")

    before = stored_tensors(tmp_path / "hf")
    assert stored_tensors(tmp_path / "back") == before
    assert there.tensors == back.tensors == len(before)
    assert there.bytes == sum(len(data) for _, _, data in before.values())
    assert there.parameters == sum(int(np.prod(shape)) for _, shape, _ in before.values())
    assert there.ignored == {}
    assert {file.name for file in (tmp_path / "ms").iterdir()} == {
        "model.safetensors",
        "config.json",
        "manifest.json",
    }


def test_names_of_the_mindspore_side(tmp_path):
    """The published parameter names, from the specification, with the bytes that belong to them."""
    write_hf_folder(tmp_path / "hf", GQA | {"n_layer": 1}, seed=2)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms.safetensors")
    torch_names = {
        "model.tok_embeddings.embedding_weight": "transformer.word_embeddings.weight",
        "model.layers.0.attention_norm.weight": "transformer.h.0.input_layernorm.weight",
        "model.layers.0.attention.wq.weight": "transformer.h.0.self_attention.query.weight",
        "model.layers.0.attention.wk_v.weight": "transformer.h.0.self_attention.key_value.weight",
        "model.layers.0.attention.wo.weight": "transformer.h.0.self_attention.dense.weight",
        "model.layers.0.attention.wo.bias": "transformer.h.0.self_attention.dense.bias",
        "model.layers.0.ffn_norm.weight": "transformer.h.0.post_attention_layernorm.weight",
        "model.layers.0.feed_forward.w1.weight": "transformer.h.0.mlp.gate_proj.weight",
        "model.layers.0.feed_forward.w3.weight": "transformer.h.0.mlp.up_proj.weight",
        "model.layers.0.feed_forward.w2.weight": "transformer.h.0.mlp.down_proj.weight",
        "model.layers.0.feed_forward.w2.bias": "transformer.h.0.mlp.down_proj.bias",
        "model.norm_out.weight": "transformer.ln_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
    before = stored_tensors(tmp_path / "hf")
    assert stored_tensors(tmp_path / "ms.safetensors") == {ms: before[pt] for ms, pt in torch_names.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_ckpt_and_bin(tmp_path, dtype):
    """Through the two older formats, each read and written by its own framework."""
    import torch
    from safetensors.torch import load_file

    write_hf_folder(tmp_path / "hf", GQA, seed=3, dtype=dtype)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "telechat.ckpt")
    convert_to_torch(tmp_path / "telechat.ckpt", tmp_path / "bin" / "pytorch_model.bin")
    state = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    original = load_file(tmp_path / "hf" / "model.safetensors")
    assert state.keys() == original.keys()
    assert all(state[name].dtype == tensor.dtype for name, tensor in original.items())
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())

    convert_to_mindspore(tmp_path / "bin", tmp_path / "ms", ckpt_format="ckpt")  # without config.json
    assert (tmp_path / "ms" / "model.ckpt").is_file()
    convert_to_torch(tmp_path / "ms", tmp_path / "back.safetensors")
    assert stored_tensors(tmp_path / "back.safetensors") == stored_tensors(tmp_path / "hf")


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bin_shards(tmp_path, with_index, zipped):
    import torch
    from safetensors.torch import load_file

    write_hf_folder(tmp_path / "hf", GQA, seed=4)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    parts = {f"pytorch_model-0000{part + 1}-of-00002.bin": list(tensors)[part::2] for part in range(2)}
    (tmp_path / "bin").mkdir()
    for file, names in parts.items():
        torch.save(
            {name: tensors[name] for name in names},
            tmp_path / "bin" / file,
            _use_new_zipfile_serialization=zipped,
        )
    if with_index:
        weight_map = {name: file for file, names in parts.items() for name in names}
        (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_to_mindspore(tmp_path / "bin", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


def test_mindspore_itself_reads_both_formats(tmp_path):
    import mindspore

    write_hf_folder(tmp_path / "hf", GQA, seed=5, dtype="bfloat16")
    expected = {name: data for name, (_, _, data) in stored_tensors(tmp_path / "hf").items()}
    for file_format in ("safetensors", "ckpt"):
        file = tmp_path / f"telechat.{file_format}"
        convert_to_mindspore(tmp_path / "hf", file)
        loaded = mindspore.load_checkpoint(str(file), format=file_format)
        assert len(loaded) == len(expected)
        key_value = loaded["model.layers.1.attention.wk_v.weight"]
        assert key_value.dtype == mindspore.bfloat16 and key_value.shape == (64, 64)
        bits = key_value.asnumpy().view(np.uint16).tobytes()
        assert bits == expected["transformer.h.1.self_attention.key_value.weight"]


def test_shards_with_an_index(tmp_path):
    write_hf_folder(tmp_path / "hf", GQA, seed=6)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    summary = convert_to_torch(tmp_path / "ms", tmp_path / "back", max_shard_size=100_000)

    before = stored_tensors(tmp_path / "hf")
    assert stored_tensors(tmp_path / "back") == before
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in before.values())
    assert index["weight_map"].keys() == before.keys()
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) == len(summary.files) > 1
    for shard in shards:
        names = {name for name, file in index["weight_map"].items() if file == shard}
        tensors = stored_tensors(tmp_path / "back" / shard)
        assert tensors.keys() == names
        assert sum(len(data) for _, _, data in tensors.values()) <= 100_000
    convert_to_mindspore(tmp_path / "back", tmp_path / "again")  # and the index is read back
    assert stored_tensors(tmp_path / "again") == stored_tensors(tmp_path / "ms")


def test_a_limit_below_every_tensor_gives_one_tensor_a_file(tmp_path):
    write_hf_folder(tmp_path / "hf", {"n_layer": 1}, seed=6)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "back", max_shard_size=1)
    assert [len(stored_tensors(file)) for file in sorted((tmp_path / "back").glob("*.safetensors"))] == [
        1
    ] * 13


def test_mixed_dtypes_stay_and_are_aligned(tmp_path):
    """Norms in float32 among bfloat16: each keeps its dtype and begins at a multiple of its width."""
    from safetensors.torch import load_file, save_file

    write_hf_folder(
        tmp_path / "hf", {"vocab_size": 129, "hidden_size": 63, "n_head": 3}, seed=14, dtype="bfloat16"
    )
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}, file)
    summary = convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")
    assert summary.dtypes == ("bfloat16", "float32")
    content = (tmp_path / "ms" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    starts = [entry["data_offsets"][0] for entry in header.values() if entry.get("dtype") == "F32"]
    assert len(starts) == 4 and all(start % 4 == 0 for start in starts)


def test_unfinished_files_are_not_read(tmp_path):
    """What a killed conversion leaves is hidden, and is no part of a checkpoint."""
    write_hf_folder(tmp_path / "hf", {}, seed=15, shards=2)
    (tmp_path / "hf" / ".123.part.model.safetensors").write_bytes(b"half")
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    (tmp_path / "ms" / ".123.part.model.safetensors").write_bytes(b"half")
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    (tmp_path / "hf" / ".123.part.model.safetensors").unlink()
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


def test_transformers_loads_the_result(tmp_path):
    """The written files are what the rest of the world takes for safetensors shards."""
    import torch
    from transformers.modeling_utils import load_sharded_checkpoint

    write_hf_folder(tmp_path / "hf", {"n_layer": 1}, seed=7)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")

    convert_to_torch(tmp_path / "ms", tmp_path / "back", max_shard_size=60_000)
    shapes = hf_shapes(json.loads((tmp_path / "hf" / "config.json").read_text()))
    root = torch.nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))
    load_sharded_checkpoint(root, str(tmp_path / "back"), strict=True)
    for name, (_, _, data) in stored_tensors(tmp_path / "hf").items():
        assert root.get_parameter(name).detach().numpy().tobytes() == data


def test_memory_does_not_grow_with_the_model(tmp_path):
    """64 MB of weights, nearly all in one tensor, pass through blocks of 16 MiB."""
    write_hf_folder(tmp_path / "hf", {"vocab_size": 250_000, "n_layer": 1}, seed=13, tied=True)
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 60e6
    assert peak_of_both_ways(tmp_path) < 20e6
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


def test_v1_names_without_the_prefix(tmp_path):
    """TeleChat v1 7B: tied, and its tensors are called h.0… and word_embeddings."""
    from safetensors.numpy import load_file, save_file

    write_hf_folder(tmp_path / "hf", MHA, seed=8, tied=True)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    (tmp_path / "v1").mkdir()
    save_file(
        {name.removeprefix("transformer."): array for name, array in tensors.items()},
        tmp_path / "v1" / "model.safetensors",
    )
    convert_to_mindspore(tmp_path / "v1", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


def test_tied_model_that_stores_its_head_too(tmp_path):
    from safetensors.numpy import load_file, save_file

    write_hf_folder(tmp_path / "hf", MHA, seed=9, tied=True)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["transformer.word_embeddings.weight"].copy()}, file)
    summary = convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    assert sum(summary.ignored.values()) == 1
    assert "lm_head.weight" not in stored_tensors(tmp_path / "ms")

    save_file(tensors | {"lm_head.weight": tensors["transformer.word_embeddings.weight"] * 2}, file)
    with refused("tie_word_embeddings", "lm_head.weight"):
        convert_to_mindspore(tmp_path / "hf", tmp_path / "ms2")
    assert not (tmp_path / "ms2").exists()

    half = tensors["transformer.word_embeddings.weight"].astype(np.float16)
    save_file(tensors | {"lm_head.weight": half}, file)
    with refused("tie_word_embeddings", "lm_head.weight"):
        convert_to_mindspore(tmp_path / "hf", tmp_path / "ms2")


def test_rotary_buffers_are_left_out_and_counted(tmp_path):
    from safetensors.numpy import load_file, save_file

    write_hf_folder(tmp_path / "hf", MHA, seed=10)
    file = tmp_path / "hf" / "model.safetensors"
    buffers = {
        f"transformer.h.{i}.self_attention.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)
    }
    save_file(load_file(file) | buffers, file)
    summary = convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    assert summary.ignored == {"rotary buffers": 2}
    assert "2 rotary buffers" in str(summary)


@pytest.mark.parametrize("recorded", ["chat", "plain"])
def test_the_prompt_format_travels_with_the_weights(tmp_path, monkeypatch, recorded):
    write_hf_folder(tmp_path / "hf", MHA, seed=11)
    (tmp_path / "hf" / "prompt_format.json").write_text(json.dumps({"prompt_format": recorded}))
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms" / "telechat.safetensors")
    convert_to_torch(tmp_path / "ms" / "telechat.safetensors", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "prompt_format.json").read_text()) == {"prompt_format": recorded}

    other = "plain" if recorded == "chat" else "chat"
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "prompt_format.json").write_text(json.dumps({"prompt_format": other}))
    monkeypatch.setattr(convert, "run_job", lambda *_: pytest.fail("the work was begun"))
    with refused("prompt_format.json", other, recorded):
        convert_to_mindspore(tmp_path / "hf", tmp_path / "mixed")
    assert [file.name for file in (tmp_path / "mixed").iterdir()] == ["prompt_format.json"]
