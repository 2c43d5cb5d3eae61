"""Relatives compute the same before and after conversion: the oracle, our model, and exported folders."""

import json

import numpy as np
import pytest
import torch
from model_fixtures import generate, int32
from oracle import load_llama, write_hf_folder
from relatives_fixtures import llama_folder, load_exported, our_model, section_of, v1_folder

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.release.description import describe_telechat, model_section
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.config.rope import base_of_release
from research.telechat2.telechat_config import TelechatConfig

SEQ_LENGTH = 32
V1_7B = {"hidden_size": 256, "n_head": 2, "ffn_hidden_size": 384, "vocab_size": 600}
V1_12B = {"hidden_size": 320, "n_head": 2, "ffn_hidden_size": 384, "vocab_size": 600}
V2 = {"num_key_value_heads": 2, "vocab_size": 600, "layer_norm_epsilon": 1e-8}
# Rotary bases up to the trained length: head_dim 128 and 4096 tokens doubled once (the published 30527.737).
THETAS = {"v1-7b": 10000 * 3 ** (128 / 126), "v1-12b": 10000.0, "v2": 10000.0}


def random_ids(seed: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, vocab_size, (2, SEQ_LENGTH + 1))


def logits_of(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def ours(weights, section, ids) -> np.ndarray:
    model = our_model(weights, section, seq_length=SEQ_LENGTH)
    return model(int32(ids))[0].asnumpy()


@pytest.fixture(scope="module", params=THETAS)
def telechat(request, tmp_path_factory, small_vocab):
    """A random model of each kind: its oracle, and the folder of its MindSpore weights."""
    folder, kind = tmp_path_factory.mktemp("telechat"), request.param
    if kind == "v2":
        write_hf_folder(folder / "hf", V2, seed=1)
        oracle, source = load_llama(folder / "hf"), folder / "hf"
    else:
        seven = kind == "v1-7b"
        v1_folder(folder, V1_7B if seven else V1_12B, seed=2, tied=seven, prefix=not seven)
        oracle, source = load_llama(folder / "as_v2", THETAS[kind]), folder / "v1"
    (source / "tokenizer.model").write_bytes(small_vocab.read_bytes())
    convert_to_mindspore(source, folder / "ms")
    convert_to_torch(folder / "ms", folder / "llama", "llama")
    return kind, folder, oracle


def section(kind, folder) -> dict:
    if kind != "v2":
        return section_of(folder / "ms")
    config = json.loads((folder / "hf" / "config.json").read_text())
    return model_section(describe_telechat(config, None, TelechatSizes.from_hf_config(config)))


def test_logits_of_ours_and_of_the_exported_folder_are_the_oracles(telechat):
    kind, folder, oracle = telechat
    ids = random_ids(3, 600)
    expected = logits_of(oracle, ids)
    assert 0.9 < expected.std() < 1.1  # the tolerance is meant for logits of about this size
    np.testing.assert_allclose(logits_of(load_exported(folder / "llama"), ids), expected, rtol=0, atol=2e-5)
    found = section(kind, folder)
    assert base_of_release(TelechatConfig(**found)) == pytest.approx(THETAS[kind], rel=1e-12)
    np.testing.assert_allclose(ours(folder / "ms", found, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "telechat", ["v2", pytest.param("v1-7b", marks=pytest.mark.slow)], indirect=True, scope="module"
)
def test_the_exported_folder_answers_a_conversation_token_by_token_as_ours(telechat, small_tokenizer):
    from transformers import AutoTokenizer

    from research.telechat2.text.chat import encode, render

    kind, folder, _ = telechat
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    messages = [{"role": "user", "content": "生抽与老抽的区别？\n1. dog"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    segments = render(messages, prompt_format="chat" if kind == "v2" else "plain", add_generation_prompt=True)
    segments = segments if kind == "v2" else segments[1:]  # v1 has no <_start>
    prompt, _ = encode(segments, small_tokenizer.vocabulary)
    assert inputs["input_ids"][0].tolist() == prompt
    model = load_exported(folder / "llama")
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist()
    model = our_model(folder / "ms", section(kind, folder), use_past=True, num_blocks=32, seq_length=256)
    assert generate(model, [prompt], 16, eos=2) == [expected]


LLAMAS = {
    "mha": {"rope_theta": 500000.0},
    "gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "num_key_value_heads": 1},
    "yarn-biases": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "attention_bias": True, "mlp_bias": True,
    },
    "yarn-whose-factor-stands": {
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
    },
}  # fmt: skip


@pytest.mark.parametrize("config", LLAMAS.values(), ids=LLAMAS)
def test_an_imported_llama_gives_its_logits(tmp_path, config):
    llama_folder(tmp_path / "llama", seed=4, biases=0.1, **config)
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    ids = np.random.default_rng(5).integers(3, 160, (2, 64))
    expected = logits_of(load_exported(tmp_path / "llama"), ids)
    assert 0.9 < expected.std() < 1.1
    found = our_model(tmp_path / "ms", section_of(tmp_path / "ms"))(int32(ids))[0].asnumpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
