"""Llama and TeleChat v1 go to MindSpore and come back byte for byte, with all that belongs to them."""

import json

import numpy as np
import pytest
from oracle import stored_tensors, write_hf_folder
from relatives_fixtures import llama_folder, load_exported, section_of, v1_folder
from safetensors.numpy import load_file, save_file

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.release.llama_config import llama_config
from research.telechat2.config.yaml_files import read_config

GQA = {"num_key_value_heads": 2}
KINDS = {
    "mha": {},
    "gqa-biases": GQA | {"attention_bias": True, "mlp_bias": True},
    "one-bias-tied": {"num_key_value_heads": 1, "mlp_bias": True, "tie_word_embeddings": True},
}


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".safetensors"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_llama_there_and_back(tmp_path, config, dtype):
    import torch
    from transformers import LlamaForCausalLM

    llama_folder(tmp_path / "fp32", biases=0.1, **config)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "fp32").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "llama", max_shard_size="50KB")
    (tmp_path / "llama" / "tokenizer.json").write_text('{"any": 1}')
    (tmp_path / "llama" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')

    there = convert_to_mindspore(tmp_path / "llama", tmp_path / "ms", max_shard_size=40_000)
    assert "model: Llama, 2 layers" in str(there)
    back = convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "llama")
    before, after = files_of(tmp_path / "llama"), files_of(tmp_path / "back")
    weights = {"manifest.json", "model.safetensors.index.json"}
    assert {name: after[name] for name in before.keys() - weights} == {
        name: content for name, content in before.items() if name not in weights
    }
    assert "tokenizer of" in str(back)


def test_names_and_rows_of_the_mindspore_side(tmp_path):
    """K and V of each head one after the other, and zeros where a Llama has no bias."""
    llama_folder(tmp_path / "llama", **GQA, num_hidden_layers=1)
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    llama = load_file(tmp_path / "llama" / "model.safetensors")
    ms = load_file(tmp_path / "ms" / "model.safetensors")
    there, here = "model.layers.0.self_attn", "model.layers.0.attention"
    key, value = llama[f"{there}.k_proj.weight"], llama[f"{there}.v_proj.weight"]
    packed = np.concatenate([key[:16], value[:16], key[16:], value[16:]])
    np.testing.assert_array_equal(ms[f"{here}.wk_v.weight"], packed)
    np.testing.assert_array_equal(ms[f"{here}.wq.weight"], llama[f"{there}.q_proj.weight"])
    for name in (f"{here}.wo.bias", "model.layers.0.feed_forward.w2.bias"):
        np.testing.assert_array_equal(ms[name], np.zeros(64, np.float32))


def test_a_llama_whose_biases_were_trained_here_gets_them(tmp_path):
    llama_folder(tmp_path / "llama")
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    file = tmp_path / "ms" / "model.safetensors"
    tensors = load_file(file)
    bias = np.full(64, 0.5, np.float32)
    save_file(tensors | {"model.layers.1.feed_forward.w2.bias": bias}, file)
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (False, True)
    back = load_exported(tmp_path / "back").model.layers
    assert back[1].mlp.down_proj.bias.tolist() == bias.tolist()
    assert not back[0].mlp.down_proj.bias.any() and not back[1].mlp.up_proj.bias.any()


def test_rotary_buffers_and_a_stored_tied_head_are_left_out(tmp_path):
    llama_folder(tmp_path / "llama", tie_word_embeddings=True)
    file = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(file)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)}
    save_file(tensors | extra | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file)
    said = str(convert_to_mindspore(tmp_path / "llama", tmp_path / "ms"))
    assert "2 rotary buffers" in said and "1 lm_head.weight, equal to the embeddings" in said
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seven", [True, False], ids=["7b", "12b"])
def test_telechat_v1_there_and_back(tmp_path, seven, dtype):
    sizes = {"hidden_size": 256, "n_head": 2} if seven else {"hidden_size": 320, "n_head": 2}
    v1_folder(tmp_path, sizes, seed=1, tied=seven, prefix=not seven)
    generation = {"bos_token_id": 132, "eos_token_id": 133, "pad_token_id": 3, "user_token_id": 130}
    (tmp_path / "v1" / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "v1" / "tokenization_telechat.py").write_text("pass\n")
    said = str(convert_to_mindspore(tmp_path / "v1", tmp_path / "ms", dtype=dtype))
    assert "TeleChat v1" in said and f"rotary base {'30527.737' if seven else '10000'}" in said
    section = section_of(tmp_path / "ms", "finetune")
    assert (section["base_seqlen"], section["training_seqlen"]) == (4096 if seven else 8192, 8192)
    assert (section["tie_word_embeddings"], section["bos_token_id"], section["eos_token_id"]) == (
        seven,
        132,
        133,
    )
    convert_to_torch(tmp_path / "ms", tmp_path / "back", dtype="float32")
    small = ("config.json", "generation_config.json", "tokenization_telechat.py")
    for name in small:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "v1" / name).read_bytes()
    if dtype == "float32":
        assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "as_v2")

    convert_to_torch(tmp_path / "ms", tmp_path / "llama", "llama")
    exported = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (exported["eos_token_id"], exported["torch_dtype"]) == (133, dtype)


def test_the_same_export_by_config_by_yaml_and_of_what_came_back(tmp_path):
    """A model trained here has no config.json: its YAML says the same."""
    write_hf_folder(tmp_path / "hf", GQA, seed=2)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    convert_to_mindspore(tmp_path / "hf", tmp_path / "alone" / "trained.safetensors")
    (tmp_path / "model.yaml").write_text(
        "base_config: telechat2-base/predict.yaml\nmodel: {model_config: {hidden_size: 64, num_layers: 2, "
        "num_heads: 4, n_kv_heads: 2, intermediate_size: 96, vocab_size: 128, seq_length: 512}}\n"
    )
    convert_to_torch(tmp_path / "ms", tmp_path / "a", "llama")
    config = tmp_path / "model.yaml"
    convert_to_torch(tmp_path / "alone" / "trained.safetensors", tmp_path / "b", "llama", config=config)
    assert stored_tensors(tmp_path / "a") == stored_tensors(tmp_path / "b")
    assert files_of(tmp_path / "a")["config.json"] == files_of(tmp_path / "b")["config.json"]
    convert_to_mindspore(tmp_path / "a", tmp_path / "again")
    assert stored_tensors(tmp_path / "again") == stored_tensors(tmp_path / "ms")


def test_yamls_beside_an_imported_llama_stand_on_the_shipped_ones(tmp_path):
    llama_folder(tmp_path / "llama", **GQA, rope_theta=5e5)
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    for kind in ("predict", "finetune"):
        config = read_config(tmp_path / "ms" / f"{kind}.yaml")
        assert config["run_mode"] == kind
        section = config["model"]["model_config"]
        assert not section.keys() & {"rms_norm_eps", "theta", "extend_method"}  # left to config.json
        assert (section["n_kv_heads"], section["seq_length"], section["type"]) == (2, 64, "TelechatConfig")
        assert section_of(tmp_path / "ms", kind)["theta"] == 5e5


YARN = "factor: 4.0, original_max_position_embeddings: 16"


@pytest.mark.parametrize("scale", ["", ", mscale: 0.7, mscale_all_dim: 0.9"], ids=["", "mscale"])
def test_an_exported_yarn_is_read_back(tmp_path, scale):
    """Its texts are shorter than factor x original, which transformers takes: the factor that is given."""
    write_hf_folder(tmp_path / "hf", GQA, seed=2)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "alone" / "a.safetensors")
    file = tmp_path / "model.yaml"
    file.write_text(
        "base_config: telechat2-base/predict.yaml\nmodel: {model_config: {hidden_size: 64, num_layers: 2, "
        "num_heads: 4, n_kv_heads: 2, intermediate_size: 96, vocab_size: 128, seq_length: 32, "
        f"extend_method: YARN, scaling_factor: {{{YARN}{scale}}}}}}}\n"
    )
    convert_to_torch(tmp_path / "alone" / "a.safetensors", tmp_path / "llama", "llama", config=file)
    convert_to_mindspore(tmp_path / "llama", tmp_path / "back")
    section = section_of(tmp_path / "back")
    given = read_config(file)["model"]["model_config"]["scaling_factor"]
    assert (section["extend_method"], section["seq_length"]) == ("YARN", 32)
    assert section["scaling_factor"] == given | {"beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize("origin", ["llama", "v1"])
def test_several_ends_go_to_the_yaml_or_are_said_to_be_left_out(tmp_path, origin):
    from mindformers.generation import GenerationConfig

    from research.telechat2.telechat_config import TelechatConfig

    if origin == "llama":
        llama_folder(tmp_path / "llama", eos_token_id=[2, 7])
    else:
        v1_folder(tmp_path, {"hidden_size": 256, "n_head": 2}, seed=1, tied=True, prefix=False)
        (tmp_path / "v1" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    said = str(convert_to_mindspore(tmp_path / origin, tmp_path / "ms"))
    section = section_of(tmp_path / "ms")
    if origin == "llama":
        assert GenerationConfig.from_model_config(TelechatConfig(**section)).eos_token_id == [2, 7]
        assert section["pad_token_id"] == 2 and "left out: 7" not in said
    else:
        assert section["eos_token_id"] == 2 and "eos_token_id of the YAMLs is 2; left out: 7" in said


def test_quantities_of_a_written_config_are_what_transformers_reads(tmp_path):
    from transformers import LlamaConfig

    llama_folder(tmp_path / "llama", **GQA, rms_norm_eps=3e-6, rope_theta=12345.5)
    from research.telechat2.checkpoint.release.llama_config import describe_llama

    given = json.loads((tmp_path / "llama" / "config.json").read_text())
    written = LlamaConfig(**llama_config(describe_llama(given), "float32")).to_dict()
    read = LlamaConfig.from_pretrained(tmp_path / "llama").to_dict()
    same = read.keys() - {"_name_or_path", "dtype", "transformers_version"}
    assert {key: written[key] for key in same} == {key: read[key] for key in same}
