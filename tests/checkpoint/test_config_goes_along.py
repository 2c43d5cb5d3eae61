"""config.json goes with the weights, there and back, so that head counts stay checked."""

import json

import pytest
from oracle import write_hf_folder
from refusal import refused

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.sizes import sizes_beside

SIZES = {
    "n_layer": 2,
    "hidden_size": 32,
    "n_head": 4,
    "num_key_value_heads": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 160,
}


@pytest.fixture
def hf(tmp_path):
    write_hf_folder(tmp_path / "hf", SIZES, seed=0)
    return tmp_path / "hf"


def test_config_is_copied_in_both_directions(hf, tmp_path):
    config = (hf / "config.json").read_bytes()
    assert "config.json goes along" in str(convert_to_mindspore(hf, tmp_path / "ms"))
    assert (tmp_path / "ms" / "config.json").read_bytes() == config
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == config
    convert_to_mindspore(tmp_path / "back", tmp_path / "again")
    sizes = sizes_beside(tmp_path / "again")
    assert (sizes.num_heads, sizes.n_kv_heads) == (4, 2)


def test_the_way_back_is_checked_against_it_too(hf, tmp_path):
    convert_to_mindspore(hf, tmp_path / "ms")
    file = tmp_path / "ms" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_key_value_heads": 1}))
    with refused("wk_v"):
        convert_to_torch(tmp_path / "ms", tmp_path / "back")


def test_another_config_is_not_overwritten(hf, tmp_path):
    (tmp_path / "ms").mkdir()
    (tmp_path / "ms" / "config.json").write_text("{}")
    with refused(tmp_path / "ms" / "config.json", hf):
        convert_to_mindspore(hf, tmp_path / "ms")
    assert [path.name for path in (tmp_path / "ms").iterdir()] == ["config.json"]


def test_a_file_as_target_takes_a_config_of_its_own_name_along(hf, tmp_path):
    """Its folder may hold other models; the numbers of this one stay with the file."""
    summary = convert_to_mindspore(hf, tmp_path / "models" / "small.safetensors")
    assert "goes along with the weights, as small.safetensors.config.json" in str(summary)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "small.safetensors",
        "small.safetensors.config.json",
        "small.safetensors.manifest.json",
    ]
    config = (tmp_path / "models" / "small.safetensors.config.json").read_bytes()
    assert config == (hf / "config.json").read_bytes()


def test_byte_order_marks_in_the_files_beside_weights_are_read_over(tmp_path):
    write_hf_folder(tmp_path / "hf", SIZES, seed=0, shards=2)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "plain")
    for file in (tmp_path / "hf").glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(list((tmp_path / "hf").glob("*.json"))) >= 2
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    plain, found = (tmp_path / name / "model.safetensors" for name in ("plain", "ms"))
    assert found.read_bytes() == plain.read_bytes()
