"""What cannot be expressed, or is broken, is a sentence, and nothing is written."""

import json
import math

import numpy as np
import pytest
from oracle import write_hf_folder
from relatives_fixtures import llama_folder
from safetensors.numpy import load_file, save_file

from research.telechat2.checkpoint import convert_to_mindspore, convert_to_torch

LAYER = "model.layers.1"


@pytest.fixture
def llama(tmp_path):
    llama_folder(tmp_path / "llama", attention_bias=True, num_key_value_heads=2)
    return tmp_path / "llama"


def refuses(call, message, *arguments, **options):
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments, **options)
    assert not arguments[1].exists()
    return str(caught.value)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling 'linear' without factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling 'yarn' without factor"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but TeleChat's feed-forward blocks are SwiGLU"),
        ({"head_dim": 32}, r"head_dim = 32, but TeleChat's heads are .* = 16 wide"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, but TeleChat rotates all"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling 'llama3'; only 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling 'dynamic'; only 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor = 'two'; expected a positive number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}}, "attention_factor"),
        ({"rope_parameters": "x"}, "rope_parameters = 'x'; expected a section such as rope_type"),
        ({"rope_parameters": {}, "rope_scaling": [1]}, r"rope_scaling = \[1\]; expected a section"),
        ({"pad_token_id": ["</s>"]}, r"pad_token_id = \['</s>'\]; expected the id of a token"),
        ({"quantization_config": {"bits": 4}}, "give the weights from before quantization"),
        ({"num_attention_heads": 7}, "7 heads; the heads must divide hidden_size"),
        ({"num_key_value_heads": 3}, "4 heads and 3 key/value heads"),
        ({"num_attention_heads": ...}, "has no num_attention_heads; take config.json from the release"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps = inf; expected a positive number"),
        ({"max_position_embeddings": 4.5}, "max_position_embeddings = 4.5; expected a whole number"),
        ({"attention_bias": "no"}, "attention_bias = 'no'; expected true or false"),
        ({"attention_bias": False}, r"8 unknown: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"mlp_bias": True}, r"6 missing: .*gate_proj\.bias"),
        ({"num_hidden_layers": 10**9}, "says 1000000000 layers, but .* holds only"),
        ({"num_key_value_heads": 4}, r"8 misshapen: model\.layers\.0\.self_attn\.k_proj"),
    ],
)  # fmt: skip
def test_configs(llama, tmp_path, changes, message):
    edit_config(llama, **changes)
    said = refuses(convert_to_mindspore, message, llama, tmp_path / "ms")
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
    refuses(convert_to_mindspore, rf"{LAYER}\.{name} in .* is not zero", llama, tmp_path / "ms")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), r"1 missing: lm_head\.weight"),
        (
            lambda tensors: tensors.pop(f"{LAYER}.self_attn.k_proj.weight"),
            r"1 missing: .*1\.self_attn\.k_proj",
        ),
        (lambda tensors: tensors.update(extra=np.ones(3, np.float32)), "1 unknown: extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(63, np.float32)}),
            r"1 misshapen: model\.norm\.weight \[63\], expected \[64\]",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.int32)}),
            r"1 non-floating-point: model\.norm\.weight \(I32\)",
        ),
        (
            lambda tensors: tensors.update(
                {f"{LAYER}.self_attn.v_proj.weight": np.ones((32, 64), np.float16)}
            ),
            r"k_proj\.weight is float32, but .*v_proj\.weight is float16",
        ),
    ],
)
def test_weights(llama, tmp_path, edit, message):
    edit_tensors(llama, edit)
    refuses(convert_to_mindspore, message, llama, tmp_path / "ms")


def test_a_tensor_in_two_shards(llama, tmp_path):
    head = load_file(llama / "model.safetensors")["lm_head.weight"]
    save_file({"lm_head.weight": head}, llama / "more.safetensors")
    refuses(convert_to_mindspore, r"1 there twice: lm_head\.weight", llama, tmp_path / "ms")


def test_a_mixture_of_experts_is_no_llama(tmp_path):
    write_hf_folder(tmp_path / "hf", {"num_experts": 4, "num_experts_per_tok": 2}, seed=0)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    refuses(
        convert_to_torch,
        "mixture of 4 experts, which is no Llama",
        tmp_path / "ms",
        tmp_path / "out",
        "llama",
    )


def test_exports_that_lack_or_contradict_something(llama, tmp_path):
    write_hf_folder(tmp_path / "hf", {}, seed=0)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "alone" / "a.safetensors")
    alone, out = tmp_path / "alone" / "a.safetensors", tmp_path / "out"
    (tmp_path / "alone" / "a.safetensors.config.json").unlink()
    refuses(convert_to_torch, "name its config.json, or the YAML .* with --config", alone, out, "llama")
    refuses(convert_to_torch, "only taken for format llama", alone, out, config=tmp_path / "hf/config.json")
    refuses(convert_to_torch, "format 'gguf' is unknown", alone, out, "gguf")
    config = tmp_path / "hf" / "config.json"
    refuses(convert_to_torch, "names one file", alone, tmp_path / "out.safetensors", "llama", config=config)
    other = {"vocab_file": tmp_path / "nowhere.model", "config": config}
    refuses(convert_to_torch, "nowhere.model does not exist", alone, out, "llama", **other)
    edit_config(tmp_path / "hf", embed_layernorm=True)
    refuses(convert_to_torch, "embed_layernorm = True", alone, out, "llama", config=config)

    convert_to_mindspore(llama, tmp_path / "ms")
    refuses(convert_to_torch, "that of a Llama model, which the torch code", tmp_path / "ms", out, "telechat")


def test_a_vocabulary_larger_than_the_model(tmp_path, small_vocab):
    write_hf_folder(tmp_path / "hf", {"vocab_size": 599}, seed=0)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    refuses(
        convert_to_torch, "has 600 ids, but the model has embeddings for 599", tmp_path / "ms",
        tmp_path / "out", "llama", vocab_file=small_vocab,
    )  # fmt: skip


def test_an_existing_export_is_not_overwritten(tmp_path):
    write_hf_folder(tmp_path / "hf", {}, seed=0)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "out", "llama")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="already holds model.safetensors"):
        convert_to_torch(tmp_path / "ms", tmp_path / "out", "llama")
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
