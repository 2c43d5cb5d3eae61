"""Whose weights these are: Llamas however their config says so, other models by name, wrong commands."""

import json

import numpy as np
import pytest
from oracle import stored_tensors, write_hf_folder
from refusal import refused
from relatives_fixtures import llama_folder, load_exported, section_of
from safetensors.numpy import load_file, save_file

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.release.kinds import model_kind
from research.telechat2.checkpoint.release.rotary import read_scaling


def edited(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


BY_CLASS = {"model_type": ..., "architectures": ["LlamaForCausalLM"]}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


@pytest.mark.parametrize(
    "changes",
    [
        BY_CLASS, {"model_type": ..., "architectures": "LLaMAForCausalLM"}, {"architectures": ...}, MISTRAL,
        MISTRAL | {"sliding_window": ...}, MISTRAL | {"sliding_window": 64}, MISTRAL | {"model_type": ...},
    ],
    ids=str,
)  # fmt: skip
def test_a_llama_and_a_mistral_without_window_are_imported(tmp_path, changes):
    llama_folder(tmp_path / "llama", num_key_value_heads=2)
    edited(tmp_path / "llama", **changes)
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    assert section_of(tmp_path / "ms")["seq_length"] == 64
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "llama")
    assert (tmp_path / "back/config.json").read_bytes() == (tmp_path / "llama/config.json").read_bytes()


def test_a_mistral_whose_biases_were_trained_here_leaves_as_a_llama(tmp_path):
    """transformers' MistralForCausalLM has no biases, and would pass them over."""
    llama_folder(tmp_path / "llama", num_key_value_heads=2)
    edited(tmp_path / "llama", **MISTRAL)
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    file = tmp_path / "ms" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.1.feed_forward.w2.bias": np.full(64, 0.5, np.float32)}, file)
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert load_exported(tmp_path / "back").model.layers[1].mlp.down_proj.bias.tolist() == [0.5] * 64


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, ["qwen2", "Qwen2ForCausalLM"]),
        ({"architectures": ["Qwen2ForCausalLM"]}, ["Qwen2ForCausalLM"]),
        ({"model_type": "qwen2_moe"}, ["qwen2_moe"]),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ["Qwen3MoeForCausalLM"]),
        ({"model_type": "qwen3"}, ["qwen3"]),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM"]),
        ({"model_type": "telechat3"}, ["telechat3"]),
        ({"model_type": "deepseek_v3"}, ["deepseek_v3", "MLA"]),
        ({"model_type": "gemma2"}, ["gemma2"]),
        ({"model_type": "newest"}, ["newest"]),
        (MISTRAL | {"sliding_window": 16, "max_position_embeddings": 64}, ["sliding_window = 16", 64]),
        (MISTRAL | {"model_type": ..., "sliding_window": 1}, ["sliding_window = 1"]),
    ],
    ids=str,
)  # fmt: skip
def test_others_are_refused_by_name_and_reason(tmp_path, config, values):
    llama_folder(tmp_path / "other")
    edited(tmp_path / "other", **({"model_type": ..., "architectures": ...} | config))
    with refused("config.json", *values):
        convert_to_mindspore(tmp_path / "other", tmp_path / "ms")
    assert not (tmp_path / "ms").exists()


@pytest.mark.parametrize(
    "config",
    [
        {}, {"model_type": "telechat"}, {"architectures": ["TelechatForCausalLM"]},
        {"model_type": "telechat2"},
        {"architectures": ["TeleChat2ForCausalLM"]}, {"architectures": ["MindIETelechatForCausalLM"]},
    ],
    ids=str,
)  # fmt: skip
def test_every_spelling_of_telechat_is_one(config):
    assert model_kind(config) == "telechat"


@pytest.mark.parametrize(
    ("config", "theta"),
    [  # as transformers 5 reads them: RotaryEmbeddingConfigMixin.convert_rope_params_to_dict
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 3e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, 3e4),
        ({"rope_theta": 3e4, "rope_scaling": None, "rope_parameters": {}}, 3e4),
        ({"rope_parameters": {"rope_type": "default"}}, 1e4),
        ({"rope_scaling": {"rope_theta": 7.0, "type": "default"}, "rope_parameters": {"rope_theta": 7}}, 7.0),
    ],
    ids=str,
)  # fmt: skip
def test_two_places_of_a_rotary_base(config, theta):
    assert read_scaling(config, 64)[0] == theta


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"rope_scaling": {"rope_theta": 1.0}, "rope_parameters": {"rope_theta": 2.0}}, ["= 1.0", "= 2.0"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 2}},
         ["factor"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
         ["rope_type = 'yarn'", "type = 'linear'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["full_attention"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor = 0.5"]),
    ],
    ids=str,
)  # fmt: skip
def test_two_places_that_differ_otherwise(config, values):
    with refused(*values):
        read_scaling(config, 64)


def test_mindspore_weights_given_as_torch_weights_and_the_other_way_round(tmp_path):
    write_hf_folder(tmp_path / "hf", {}, seed=1)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    convert_to_mindspore(tmp_path / "hf", tmp_path / "a.safetensors")
    (tmp_path / "b.ckpt").write_bytes(b"x")
    (tmp_path / "run" / "rank_0").mkdir(parents=True)
    for path in ("ms", "ms/model.safetensors", "a.safetensors", "b.ckpt", "run"):
        with refused(tmp_path / path, "--pre_ckpt_path", "convert_reversed.py"):
            convert_to_mindspore(tmp_path / path, tmp_path / "out")
    for path in ("hf", "hf/model.safetensors"):
        with refused(tmp_path / path, "convert_weight.py --torch_path"):
            convert_to_torch(tmp_path / path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "width"),
    [("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("F4", 0.5), ("F6_E2M3", 0.75), ("I8", 1), ("BOOL", 1),
     ("F64", 8), ("U4", 0.5)],
)  # fmt: skip
@pytest.mark.parametrize("joined", [False, True])
def test_other_dtypes_are_refused_by_name(tmp_path, dtype, width, joined):
    from research.telechat2.checkpoint.convert_layout import convert_layout

    write_hf_folder(tmp_path / "hf", {"num_key_value_heads": 2}, seed=1)
    convert_layout(tmp_path / "hf", tmp_path / "m.safetensors", qkv_concat=joined)
    source = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(source[:8], "little")
    header, data, place = json.loads(source[8 : 8 + length]), b"", 0
    header.pop("__metadata__")
    for name, entry in header.items():  # the same shapes, zeros of another type
        count = int(np.prod(entry["shape"]) * (width if "w" in name else 4))
        entry |= {"dtype": dtype if "w" in name else "F32", "data_offsets": [place, place + count]}
        place += count
        data += bytes(count)
    text = json.dumps({"__metadata__": {"format": "ms", "qkv_concat": "1"}} | header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with refused({"I8": "int8", "BOOL": "bool", "F64": "float64"}.get(dtype, dtype)) as caught:
        convert_to_torch(tmp_path / "m.safetensors", tmp_path / "out")
    assert "before quantization" in str(caught.value).replace("\n", " ")
    assert "Download" not in str(caught.value)


def test_what_else_a_bin_file_holds_is_not_loaded(tmp_path):
    """Nothing runs, and no message advises to let it."""
    import torch

    write_hf_folder(tmp_path / "hf", {}, seed=1)
    (tmp_path / "hf" / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"transformer.ln_f.weight": torch.zeros(3), "x": Evil()}, tmp_path / "hf/pytorch_model.bin")
    with refused("state_dict") as caught:
        convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    assert "weights_only" not in str(caught.value) and not ran.exists()


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "..\\x", "\0", ""]
)
def test_an_index_names_files_beside_it_alone(tmp_path, shard):
    write_hf_folder(tmp_path / "hf", {}, seed=1, shards=2)
    file = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = shard
    file.write_text(json.dumps(index))
    with refused("index.json"):
        convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")


def test_code_that_comes_with_weights_does_not_run(tmp_path, small_vocab):
    """auto_map, Python files and a tokenizer class of the folder's own: they go along, and nothing more."""
    code = {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "vocab_size": 600}
    write_hf_folder(tmp_path / "hf", code, seed=1)
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("evil.py", "modeling_telechat.py", "tokenization_telechat.py", "telechat_register.py"):
        (tmp_path / "hf" / name).write_text(evil)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(small_vocab.read_bytes())
    (tmp_path / "hf" / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "evil.T"})
    )
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "llama", "llama")
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in (tmp_path / "llama" / "config.json").read_text()
