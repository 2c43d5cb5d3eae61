"""What cannot be expressed, or is broken, is a sentence, and nothing is written."""

import json
import math

import numpy as np
import pytest
from oracle import write_hf_folder
from refusal import refused
from relatives_fixtures import llama_folder
from safetensors.numpy import load_file, save_file

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch

LAYER = "model.layers.1"


@pytest.fixture
def llama(tmp_path):
    llama_folder(tmp_path / "llama", attention_bias=True, num_key_value_heads=2)
    return tmp_path / "llama"


def refuses(call, values, *arguments, **options):
    with refused(*values) as caught:
        call(*arguments, **options)
    assert not arguments[1].exists()
    return str(caught.value)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling 'linear'", "factor"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_scaling 'yarn'", "factor"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "SwiGLU"]),
        ({"head_dim": 32}, ["head_dim = 32", 16]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["'llama3'", "linear", "yarn"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "linear", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, ["= 'two'"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}}, ["factor 1.0"]),
        ({"rope_parameters": "x"}, ["rope_parameters = 'x'", "rope_type"]),
        ({"rope_parameters": {}, "rope_scaling": [1]}, ["rope_scaling = [1]"]),
        ({"pad_token_id": ["</s>"]}, ["pad_token_id = ['</s>']"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bfloat16"]),
        ({"num_attention_heads": 7}, ["hidden_size", "num_heads = 7"]),
        ({"num_key_value_heads": 3}, ["num_heads = 4", "n_kv_heads = 3"]),
        ({"num_attention_heads": ...}, ["num_attention_heads"]),
        ({"rms_norm_eps": math.inf}, ["rms_norm_eps = inf"]),
        ({"max_position_embeddings": 4.5}, ["max_position_embeddings = 4.5"]),
        ({"attention_bias": "no"}, ["attention_bias = 'no'"]),
        ({"attention_bias": False}, ["8 unknown", "model.layers.0.self_attn.k_proj.bias"]),
        ({"mlp_bias": True}, ["6 missing", "gate_proj.bias"]),
        ({"num_hidden_layers": 10**9}, [10**9]),
        ({"num_key_value_heads": 4}, ["8 misshapen", "model.layers.0.self_attn.k_proj"]),
    ],
)  # fmt: skip
def test_configs(llama, tmp_path, changes, values):
    edit_config(llama, **changes)
    said = refuses(convert_to_mindspore, values, llama, tmp_path / "ms")
    assert "config" in said.splitlines()[0] or "Llama checkpoint" in said


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"])
def test_a_bias_that_telechat_lacks(llama, tmp_path, name):
    edit_tensors(
        llama, lambda tensors: tensors.update({f"{LAYER}.{name}": tensors[f"{LAYER}.{name}"] + 1e-30})
    )
    refuses(convert_to_mindspore, [f"{LAYER}.{name}"], llama, tmp_path / "ms")


@pytest.mark.parametrize(
    ("edit", "values"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), ["1 missing: lm_head.weight"]),
        (
            lambda tensors: tensors.pop(f"{LAYER}.self_attn.k_proj.weight"),
            ["1 missing", f"{LAYER}.self_attn.k_proj"],
        ),
        (lambda tensors: tensors.update(extra=np.ones(3, np.float32)), ["1 unknown: extra"]),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(63, np.float32)}),
            ["1 misshapen: model.norm.weight [63]", [64]],
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.int32)}),
            ["1 non-floating-point: model.norm.weight (int32)"],
        ),
        (
            lambda tensors: tensors.update(
                {f"{LAYER}.self_attn.v_proj.weight": np.ones((32, 64), np.float16)}
            ),
            ["k_proj.weight is float32", "v_proj.weight is float16"],
        ),
    ],
)
def test_weights(llama, tmp_path, edit, values):
    edit_tensors(llama, edit)
    refuses(convert_to_mindspore, values, llama, tmp_path / "ms")


def test_a_tensor_in_two_shards(llama, tmp_path):
    head = load_file(llama / "model.safetensors")["lm_head.weight"]
    save_file({"lm_head.weight": head}, llama / "more.safetensors")
    refuses(convert_to_mindspore, ["1 there twice: lm_head.weight"], llama, tmp_path / "ms")


def test_a_mixture_of_experts_is_no_llama(tmp_path):
    write_hf_folder(tmp_path / "hf", {"num_experts": 4, "num_experts_per_tok": 2}, seed=0)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    refuses(
        convert_to_torch,
        ["4 experts"],
        tmp_path / "ms",
        tmp_path / "out",
        "llama",
    )


def test_exports_that_lack_or_contradict_something(llama, tmp_path):
    write_hf_folder(tmp_path / "hf", {}, seed=0)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "alone" / "a.safetensors")
    alone, out = tmp_path / "alone" / "a.safetensors", tmp_path / "out"
    (tmp_path / "alone" / "a.safetensors.config.json").unlink()
    refuses(convert_to_torch, ["config.json", "--config"], alone, out, "llama")
    refuses(convert_to_torch, ["format llama"], alone, out, config=tmp_path / "hf/config.json")
    refuses(convert_to_torch, ["gguf", "telechat", "llama"], alone, out, "gguf")
    config = tmp_path / "hf" / "config.json"
    refuses(
        convert_to_torch,
        [tmp_path / "out.safetensors"],
        alone,
        tmp_path / "out.safetensors",
        "llama",
        config=config,
    )
    other = {"vocab_file": tmp_path / "nowhere.model", "config": config}
    refuses(convert_to_torch, ["nowhere.model"], alone, out, "llama", **other)
    edit_config(tmp_path / "hf", embed_layernorm=True)
    refuses(convert_to_torch, ["embed_layernorm = True"], alone, out, "llama", config=config)

    convert_to_mindspore(llama, tmp_path / "ms")
    refuses(convert_to_torch, [tmp_path / "ms", "format llama"], tmp_path / "ms", out, "telechat")


def test_a_vocabulary_larger_than_the_model(tmp_path, small_vocab):
    write_hf_folder(tmp_path / "hf", {"vocab_size": 599}, seed=0)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    refuses(
        convert_to_torch, ["600 ids", 599], tmp_path / "ms",
        tmp_path / "out", "llama", vocab_file=small_vocab,
    )  # fmt: skip


def test_an_existing_export_is_not_overwritten(tmp_path):
    write_hf_folder(tmp_path / "hf", {}, seed=0)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "out", "llama")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with refused(tmp_path / "out", "model.safetensors"):
        convert_to_torch(tmp_path / "ms", tmp_path / "out", "llama")
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
