"""The commands for relatives as a user runs them."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from oracle import stored_tensors, write_hf_folder
from relatives_fixtures import llama_folder, load_exported

from research.telechat2.checkpoint import convert_to_mindspore

CHECKOUT = Path(__file__).resolve().parents[2]


def command(script, *arguments, cwd, seconds=60):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, CHECKOUT / script, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


def test_a_telechat_model_becomes_a_llama_and_comes_back(tmp_path, small_vocab):
    write_hf_folder(tmp_path / "hf", {"vocab_size": 600}, seed=1, dtype="bfloat16")
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    there = command(
        "research/telechat2/convert_reversed.py", "--mindspore_path", "ms", "--torch_path", "llama",
        "--format", "llama", "--vocab_file_path", small_vocab, cwd=tmp_path,
    )  # fmt: skip
    assert there.returncode == 0, there.stderr
    assert "written as LlamaForCausalLM, with 10 all-zero biases that TeleChat lacks\n" in there.stdout
    assert "with the chat template of the chat format\n" in there.stdout
    back = command(
        "research/telechat2/convert_weight.py",
        "--torch_path",
        "llama",
        "--mindspore_path",
        "back",
        cwd=tmp_path,
    )
    assert back.returncode == 0, back.stderr
    assert "model: Llama, 2 layers" in back.stdout
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "ms")
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"}
    assert names | {"predict.yaml", "finetune.yaml"} <= {file.name for file in (tmp_path / "back").iterdir()}

    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    refused = command(
        "research/telechat2/convert_weight.py",
        "--torch_path",
        "llama",
        "--mindspore_path",
        "no",
        cwd=tmp_path,
    )
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: llama/config.json: the config says hidden_act = 'relu'")


@pytest.mark.slow  # starts MindFormers
def test_an_imported_llama_is_asked_with_its_own_tokenizer(tmp_path):
    """run_mindformer.py on predict.yaml answers as transformers does, token by token."""
    import sentencepiece
    import torch

    llama_folder(tmp_path / "llama", vocab_size=330, num_key_value_heads=2, max_position_embeddings=128)
    text = "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox."
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20), model_prefix=str(tmp_path / "llama" / "tokenizer"),
        model_type="bpe", vocab_size=330, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    settings = {
        "base_config": "ms/predict.yaml",
        "context": {"device_target": "CPU", "jit_config": {"jit_level": "O0"}},
        "model": {
            "model_config": dict.fromkeys(("compute_dtype", "param_init_type", "res_dtype"), "float32")
            | {"max_decode_length": 24}
        },
    }
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(settings))
    asked = command(
        "run_mindformer.py", "--config", "cpu.yaml", "--load_checkpoint", "ms", "--use_parallel", "False",
        "--processor.tokenizer.vocab_file", "ms/tokenizer.model", "--predict_data", "The quick brown",
        "--output_dir", "out", cwd=tmp_path, seconds=300,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "ms" / "tokenizer.model"))
    prompt = torch.tensor([[1, *tokenizer.encode("The quick brown")]])
    expected = load_exported(tmp_path / "llama").generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=24, do_sample=False, pad_token_id=2
    )
    answer = (tmp_path / "out" / "text_generation_result.txt").read_text(encoding="utf-8")
    assert ast.literal_eval(answer)[0]["text_generation_text"] == [tokenizer.decode(expected[0].tolist())]
