"""Files whose rows are joined and whose header is gone; lone files whose heads only --model_name tells."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import stored_tensors, write_hf_folder
from refusal import refused

from research.telechat2.checkpoint import convert_layout as relayout
from research.telechat2.checkpoint.convert import convert_to_torch
from research.telechat2.checkpoint.convert_layout import convert_layout
from research.telechat2.checkpoint.layouts.read import assume_joined_for, whole_weights
from research.telechat2.run.load_checkpoint import prepare_checkpoint

CHECKOUT = Path(__file__).resolve().parents[2]
SIZES = {"num_key_value_heads": 2, "vocab_size": 128}


@pytest.fixture
def joined(tmp_path):
    """A file joined for two ranks, without its header's metadata, and with its config."""
    from safetensors.numpy import load_file, save_file

    write_hf_folder(tmp_path / "hf", SIZES, seed=1)
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "m.safetensors"
    convert_layout(tmp_path / "hf", file, qkv_concat=True, tensor_parallel=2)
    save_file(load_file(file), file)
    yield file
    assume_joined_for(None)


def test_the_manifest_beside_it_counts(joined, tmp_path):
    convert_to_torch(joined, tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


def test_without_it_the_user_says_for_how_many_ranks(joined, tmp_path, capsys):
    manifest = joined.with_name("m.safetensors.manifest.json")
    text = manifest.read_text()
    manifest.unlink()
    for read in (lambda: convert_to_torch(joined, tmp_path / "back"), lambda: whole_weights(joined)):
        with refused(joined, "qkv_concat", "--joined_for N"):
            read()
    assume_joined_for(2)
    convert_to_torch(joined, tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")
    manifest.write_text(text)
    assume_joined_for(1)
    with refused("--joined_for", 1, joined, 2):
        whole_weights(joined)
    with refused("--joined_for", 0):
        assume_joined_for(0)


def test_a_manifest_of_another_file_does_not_count(joined):
    other = joined.with_name("other.safetensors")
    joined.rename(other)
    joined.with_name("m.safetensors.config.json").rename(joined.with_name("config.json"))
    with refused("--joined_for N"):
        whole_weights(other)
    content = json.loads(joined.with_name("m.safetensors.manifest.json").read_text())
    content["files"] = {"other.safetensors": {}}
    content["options"]["layout"]["qkv_concat"] = "no"
    joined.with_name("manifest.json").write_text(json.dumps(content))
    with refused("manifest.json", "qkv_concat", "no"):
        whole_weights(other)


def test_folders_of_ranks_show_it_by_their_number(tmp_path):
    from safetensors.numpy import load_file, save_file

    write_hf_folder(tmp_path / "hf", SIZES, seed=1)
    convert_layout(tmp_path / "hf", tmp_path / "ranks", qkv_concat=True, tensor_parallel=2)
    for file in tmp_path.glob("ranks/rank_*/*.safetensors"):
        save_file(load_file(file), file)
    (tmp_path / "ranks" / "manifest.json").unlink()
    convert_to_torch(tmp_path / "ranks", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


def test_the_commands_take_it(joined, tmp_path):
    joined.with_name("m.safetensors.manifest.json").unlink()
    command = [sys.executable, str(CHECKOUT / "research/telechat2/convert_reversed.py"), "--mindspore_path"]
    command += [str(joined), "--torch_path", "back"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 1 and "--joined_for N" in told.stderr
    told = subprocess.run([*command, "--joined_for", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


@pytest.fixture
def lone(tmp_path, monkeypatch):
    """A lone .ckpt, and the release "telechat_7B" of its sizes."""
    write_hf_folder(tmp_path / "hf", SIZES, seed=1)
    convert_layout(tmp_path / "hf", tmp_path / "a.ckpt", qkv_concat=False)
    for file in tmp_path.glob("a.ckpt.*"):
        file.unlink()
    monkeypatch.setitem(relayout.RELEASES, "telechat_7B", (2, 64, 96, 4, 2, 0))
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize("name", ["telechat_7B", "TeleChat2-7b"])
def test_the_readmes_command_for_a_lone_ckpt(lone, tmp_path, name):
    with refused("config.json", "--model_name"):
        convert_layout(lone, tmp_path / "no.ckpt", qkv_concat=True)
    convert_layout(lone, tmp_path / "qkv.ckpt", qkv_concat=True, model_name=name)
    # and back, of a lone joined file, whose manifest says for how many ranks
    convert_layout(tmp_path / "qkv.ckpt", tmp_path / "back.safetensors", qkv_concat=False, model_name=name)
    convert_to_torch(tmp_path / "back.safetensors", tmp_path / "torch")
    assert stored_tensors(tmp_path / "torch") == stored_tensors(tmp_path / "hf")


def test_a_name_of_other_heads_than_config_json(lone, tmp_path):
    with refused("telechat_115B", "num_layers 2", 96):
        convert_layout(lone, tmp_path / "no.ckpt", qkv_concat=True, model_name="telechat_115B")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {
        "n_head": 8,
        "num_key_value_heads": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused("num_heads 8", 4):
        convert_layout(lone, tmp_path / "no.ckpt", qkv_concat=True, model_name="telechat_7B")


def test_the_plain_model_reads_joined_rows_and_names_the_class_that_has_them(lone, tmp_path, capsys):
    convert_layout(lone, tmp_path / "qkv.ckpt", qkv_concat=True, model_name="telechat_7B")
    config = {
        "model": {
            "model_config": {
                "type": "TelechatConfig", "hidden_size": 64, "num_layers": 2, "num_heads": 4,
                "n_kv_heads": 2, "intermediate_size": 96, "vocab_size": 128,
            },
            "arch": {"type": "TelechatForCausalLM"},
        },
        "load_checkpoint": str(tmp_path / "qkv.ckpt"),
    }  # fmt: skip
    assert prepare_checkpoint(config, training=False) == tmp_path / "qkv.ckpt"
