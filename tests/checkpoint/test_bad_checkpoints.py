"""Checkpoints that are incomplete, foreign or in the way: one sentence that says so, and nothing written."""

import json
import shutil
import struct

import numpy as np
import pytest
from oracle import write_hf_folder
from refusal import refused
from safetensors.numpy import load_file, save_file

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.job import output, run


@pytest.fixture
def hf(tmp_path):
    """A sound folder of three shards, with an index."""
    write_hf_folder(tmp_path / "hf", {"num_key_value_heads": 2}, seed=1, shards=3)
    return tmp_path / "hf"


@pytest.fixture
def ms(hf, tmp_path):
    """The same as a MindSpore file."""
    convert_to_mindspore(hf, tmp_path / "ms.safetensors")
    return tmp_path / "ms.safetensors"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_indexed(hf, shard, change):
    """Change the tensors of a shard, and the index with them."""
    edit(shards(hf)[shard], change)
    index = hf / "model.safetensors.index.json"
    weight_map = {name: file.name for file in shards(hf) for name in load_file(file)}
    index.write_text(json.dumps({"weight_map": weight_map}))


def refuses(source, *values, convert=convert_to_mindspore):
    """The error of the conversion names ``values``, and the folder of its target stays as it was."""
    before = sorted(source.parent.rglob("*"))
    with refused(*values) as caught:
        convert(source, source.parent / "new" / "target")
    assert sorted(source.parent.rglob("*")) == before
    return str(caught.value)


def test_unknown_missing_and_misshapen_are_listed_together(hf):
    def change(tensors):
        for number in range(12):
            tensors[f"transformer.h.0.adapter_{number:02d}.weight"] = np.ones(2, np.float32)
        del tensors["transformer.h.1.mlp.up_proj.weight"]
        tensors["lm_head.weight"] = np.ones((127, 64), np.float32)
        tensors["transformer.ln_f.weight"] = np.ones(64, np.int32)

    edit_indexed(hf, 2, change)
    text = refuses(hf, hf, "2 layers")
    assert "12 unknown: transformer.h.0.adapter_00.weight, " in text
    assert "adapter_09.weight and 2 more" in text and "adapter_10" not in text
    assert "1 missing: transformer.h.1.mlp.up_proj.weight" in text
    assert "1 misshapen: lm_head.weight [127, 64], expected [128, 64]" in text
    assert "1 non-floating-point: transformer.ln_f.weight (int32)" in text


def test_duplicate_tensor_in_two_shards(hf):
    (hf / "model.safetensors.index.json").unlink()
    first, second, _ = shards(hf)
    name, array = next(iter(load_file(first).items()))
    edit(second, lambda tensors: tensors.update({name: array}))
    text = refuses(hf, "1 duplicate")
    assert f"{name} (in {first.name} and {second.name})" in text


def test_shard_named_by_the_index_is_absent(hf):
    shards(hf)[1].unlink()
    refuses(hf, "model.safetensors.index.json", "model-00002-of-00003.safetensors")


def test_shard_beside_the_index_is_not_in_it(hf):
    shutil.copy(shards(hf)[0], hf / "model-extra.safetensors")
    refuses(hf, "model.safetensors.index.json", "model-extra.safetensors")


def test_tensor_is_not_where_the_index_says(hf):
    edit(shards(hf)[0], lambda tensors: tensors.pop("transformer.word_embeddings.weight"))
    refuses(hf, "transformer.word_embeddings.weight (model-00001")


def test_tensor_is_not_in_the_index(hf):
    edit(shards(hf)[0], lambda tensors: tensors.update({"transformer.extra": np.ones(1, np.float32)}))
    refuses(hf, "transformer.extra (model-00001")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 100_000]
)
def test_index_is_not_one(hf, content):
    (hf / "model.safetensors.index.json").write_text(content)
    refuses(hf, "model.safetensors.index.json", "weight_map")


def test_index_points_out_of_its_folder(hf):
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
    refuses(hf, "lm_head.weight", "../other.safetensors")


def test_numbered_shard_is_missing_and_there_is_no_index(hf):
    (hf / "model.safetensors.index.json").unlink()
    shards(hf)[2].unlink()
    refuses(hf, hf, "2 files", 3, "model-00001-of-00003.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 3000, -1])
def test_truncated_shard(hf, kept):
    file = shards(hf)[1]
    file.write_bytes(file.read_bytes()[:kept])
    refuses(hf, "model-00002-of-00003.safetensors")


def test_longer_file_than_its_header_says(ms):
    ms.write_bytes(ms.read_bytes() + b"\0" * 8)
    refuses(ms, ms.stat().st_size - 8, ms.stat().st_size, convert=convert_to_torch)


def test_header_with_a_name_twice(ms):
    entry = '"lm_head.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    ms.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refuses(ms, ms, "lm_head.weight", convert=convert_to_torch)


def test_tensors_that_overlap(ms):
    """Every length is right and the file is as long as the header says, but two tensors share their bytes."""
    content = ms.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["model.layers.1.ffn_norm.weight"] = header["model.layers.0.ffn_norm.weight"]
    text = json.dumps(header).encode()
    ms.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    refuses(ms, "model.layers.1.ffn_norm.weight, F32 [64]", "256 bytes", convert=convert_to_torch)


def test_fewer_layers_than_the_config_says(hf):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    refuses(hf, "10 missing: transformer.h.2.input_layernorm.weight")
    (hf / "config.json").write_text(json.dumps(config | {"n_layer": 10**12}))
    refuses(hf, 10**12, "23 tensors")


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("{", ["JSON"]),
        ("[]", ["list"]),
        ('{"model_type": "bloom"}', ["bloom"]),
        ('{"n_embed": 8}', ["n_layer", "num_layers", "n_embed"]),
    ],
)
def test_config_is_not_a_telechat_config(hf, content, values):
    (hf / "config.json").write_text(content)
    refuses(hf, "config.json", *values)


def test_untied_model_without_its_head(hf):
    edit_indexed(hf, 2, lambda tensors: tensors.pop("lm_head.weight"))
    refuses(hf, "1 missing: lm_head.weight")


def test_a_llama_checkpoint(tmp_path):
    (tmp_path / "llama").mkdir()
    save_file(
        {"model.embed_tokens.weight": np.ones((4, 4), np.float32)}, tmp_path / "llama" / "m.safetensors"
    )
    refuses(tmp_path / "llama", "model.embed_tokens.weight", "transformer.h.0.")


def test_the_wrong_direction(hf, ms):
    refuses(hf, hf, "convert_weight.py --torch_path", convert=convert_to_torch)
    refuses(ms, ms, "convert_reversed.py", "--pre_ckpt_path")


def test_huge_layer_number_in_a_name(tmp_path):
    (tmp_path / "x").mkdir()
    write_hf_folder(tmp_path / "x", {}, seed=1)
    (tmp_path / "x" / "config.json").unlink()
    file = tmp_path / "x" / "model.safetensors"
    stray = {"transformer.h.999999999.mlp.down_proj.bias": np.ones(64, np.float32)}
    edit(file, lambda tensors: tensors.update(stray))
    refuses(file.parent, "1 unknown: transformer.h.999999999.mlp.down_proj.bias", "24 layers")


def test_empty_and_absent_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "*.safetensors", "pytorch_model*.bin", "nothing")
    refuses(tmp_path / "empty", "*.safetensors", "*.ckpt", "nothing", convert=convert_to_torch)
    refuses(tmp_path / "absent", tmp_path / "absent")
    refuses(tmp_path / "absent.ckpt", tmp_path / "absent.ckpt", convert=convert_to_torch)
    (tmp_path / "weights.pth").write_bytes(b"x")
    refuses(tmp_path / "weights.pth", ".pth", ".safetensors", ".bin")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04broken", b"\x80\x02}q\x00.", b"\n\x05hello" * 50])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "telechat.ckpt"])
def test_broken_bin_and_ckpt(tmp_path, name, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    refuses(
        tmp_path / "in",
        tmp_path / "in",
        convert=convert_to_mindspore if name.endswith(".bin") else convert_to_torch,
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 499723\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.ckpt"])
@pytest.mark.parametrize(
    ("content", "what"),
    [(POINTER, "git lfs pull"), (b"<!DOCTYPE html><html>", "web server"), (b"Entry not found", "web server")],
)
def test_what_stands_in_the_place_of_weights_is_named(tmp_path, name, content, what):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    convert = convert_to_torch if name.endswith(".ckpt") else convert_to_mindspore
    refuses(tmp_path / "in", name, what, convert=convert)


def test_a_pointer_in_the_place_of_a_vocabulary_is_named(tmp_path):
    from research.telechat2.text.load_vocabulary import load_vocabulary

    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    with refused("tokenizer.model", "git lfs pull"):
        load_vocabulary(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_is_no_broken_download_and_runs_nothing(tmp_path, protocol):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "EXECUTED"), "w"))

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol=protocol))
    refuses(tmp_path / "in", "pytorch_model.bin", "state_dict()")
    assert not (tmp_path / "EXECUTED").exists()


def test_a_name_of_a_hub_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("TeleAI/TeleChat2-7B", "hub"):
        convert_to_mindspore("TeleAI/TeleChat2-7B", "new")


def test_the_folder_that_one_is_in_is_a_source_and_a_target(hf, tmp_path, monkeypatch):
    monkeypatch.chdir(hf)
    convert_to_mindspore(".", "../new")
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    convert_to_torch("../new", ".")
    assert (tmp_path / "again" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    monkeypatch.chdir(tmp_path / "new")
    convert_to_torch(".", "../third")


def test_an_adapter_is_no_model(hf, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(next(hf.glob("*.safetensors")).read_bytes())
    for path in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        refuses(path, "PEFT", "merge_and_unload()")


def test_bin_that_is_not_a_dictionary_of_tensors(tmp_path):
    import torch

    torch.save({"state_dict": {"lm_head.weight": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    refuses(tmp_path / "pytorch_model.bin", "pytorch_model.bin", "state_dict()")


def test_existing_results_are_not_overwritten(hf, ms, tmp_path):
    before = ms.read_bytes()
    with refused(ms):
        convert_to_mindspore(hf, ms)
    assert ms.read_bytes() == before
    convert_to_mindspore(hf, tmp_path / "out")
    with refused(tmp_path / "out", "model.safetensors"):
        convert_to_mindspore(hf, tmp_path / "out")
    with refused(tmp_path / "out", "model.safetensors"):
        convert_to_torch(ms, tmp_path / "out")
    (tmp_path / "plain").write_text("a file")
    with refused(tmp_path / "plain"):
        convert_to_mindspore(hf, tmp_path / "plain")


def test_output_is_input(hf, ms):
    before = sorted(hf.iterdir())
    with refused(hf):
        convert_to_mindspore(hf, hf)
    with refused(hf / "telechat.safetensors"):
        convert_to_mindspore(hf, hf / "telechat.safetensors")
    assert sorted(hf.iterdir()) == before
    with refused(ms):
        convert_to_torch(ms, ms)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "telechat.ckpt"])
def test_a_folder_does_not_receive_what_would_shadow_its_input(hf, tmp_path, name):
    """Neither of these ends in .safetensors, which readers take first."""
    import torch

    folder = tmp_path / "own"
    folder.mkdir()
    if name.endswith(".bin"):
        tensors = {key: torch.tensor(array) for file in shards(hf) for key, array in load_file(file).items()}
        torch.save(tensors, folder / name)
        (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
        convert = convert_to_mindspore
    else:
        convert_to_mindspore(hf, folder / name)
        convert = convert_to_torch
    before = sorted(folder.iterdir())
    for source in (folder, folder / name):
        with refused(folder):
            convert(source, folder)
    assert sorted(folder.iterdir()) == before


def test_a_file_that_appears_meanwhile_is_not_overwritten(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fsync", lambda _: (tmp_path / "new.safetensors").write_text("another's"))
    with refused(tmp_path / "new.safetensors"):
        convert_to_mindspore(hf, tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").read_text() == "another's"


def test_disk_without_room(hf, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    refuses(hf, "1,000 bytes")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_interrupted_conversion(hf, tmp_path, monkeypatch, error):
    def fail(path):
        raise error

    monkeypatch.setattr(run, "fsync", fail)
    (tmp_path / "there").mkdir()
    for target in ("there", "new/deep/target", "there/a.ckpt"):
        with pytest.raises(type(error)):
            convert_to_mindspore(hf, tmp_path / target)
    assert list((tmp_path / "there").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_unknown_options_and_empty_paths(hf, tmp_path):
    with pytest.raises(
        ValueError, match="dtype 'int8' is unknown; expected one of float32, float16, bfloat16"
    ):
        convert_to_mindspore(hf, tmp_path / "x", dtype="int8")
    with refused("ckpt_format", "zip", "safetensors", "ckpt"):
        convert_to_mindspore(hf, tmp_path / "x", ckpt_format="zip")
    with refused("x.ckpt", "safetensors"):
        convert_to_mindspore(hf, tmp_path / "x.ckpt", ckpt_format="safetensors")
    with refused("mindspore_path"):
        convert_to_mindspore(hf, "")
