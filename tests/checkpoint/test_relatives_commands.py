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
from relatives_fixtures import byte_level_tokenizer, llama_folder, load_exported, v1_folder

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch

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

    predict = yaml.safe_load((tmp_path / "back" / "predict.yaml").read_text())
    assert "processor" not in predict  # the vocabulary is TeleChat's: TelechatTokenizer reads it

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
    assert (
        refused.stderr.startswith("error: ")
        and "llama/config.json: " in refused.stderr
        and "'relu'" in refused.stderr
    )


def ask(folder: Path, vocab_file: str, prompt: str, max_length: int) -> str:
    """What run_mindformer.py answers on a CPU by ms/predict.yaml, prompt included."""
    fp32 = dict.fromkeys(("compute_dtype", "param_init_type", "res_dtype"), "float32")
    settings = {
        "base_config": "ms/predict.yaml",
        "context": {"device_target": "CPU", "jit_config": {"jit_level": "O0"}},
        "model": {"model_config": fp32 | {"max_decode_length": max_length, "seq_length": 128}},
    }
    (folder / "cpu.yaml").write_text(yaml.safe_dump(settings))
    asked = command(
        "run_mindformer.py", "--config", "cpu.yaml", "--load_checkpoint", "ms", "--use_parallel", "False",
        "--processor.tokenizer.vocab_file", vocab_file, "--predict_data", prompt,
        "--output_dir", "out", cwd=folder, seconds=300,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    answers = ast.literal_eval((folder / "out" / "text_generation_result.txt").read_text(encoding="utf-8"))
    return answers[0]["text_generation_text"][0]


def transformers_answer(folder: Path, ids: list[int], max_length: int) -> list[int]:
    import torch

    prompt = torch.tensor([ids])
    answer = load_exported(folder).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=max_length, do_sample=False
    )
    return answer[0].tolist()


@pytest.mark.slow  # starts MindFormers
def test_an_imported_llama_is_asked_with_its_own_tokenizer(tmp_path):
    """run_mindformer.py on predict.yaml answers as transformers does, token by token."""
    import sentencepiece

    llama_folder(tmp_path / "llama", vocab_size=330, num_key_value_heads=2, max_position_embeddings=128)
    text = "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox."
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20), model_prefix=str(tmp_path / "llama" / "tokenizer"),
        model_type="bpe", vocab_size=330, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "ms" / "tokenizer.model"))
    expected = transformers_answer(tmp_path / "llama", [1, *tokenizer.encode("The quick brown")], 24)
    assert ask(tmp_path, "ms/tokenizer.model", "The quick brown", 24) == tokenizer.decode(expected)


@pytest.mark.slow  # starts MindFormers
def test_v1_7b_is_asked_with_its_byte_level_tokenizer(tmp_path):
    """As transformers answers from the exported folder with the tokenizer that went along."""
    from transformers import AutoTokenizer

    byte_level_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sizes = {"hidden_size": 256, "n_head": 2, "vocab_size": len(tokenizer)}
    v1_folder(tmp_path, sizes, seed=3, tied=True, prefix=False)
    byte_level_tokenizer(tmp_path / "v1")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    (tmp_path / "v1" / "generation_config.json").write_text(json.dumps(ids))
    convert_to_mindspore(tmp_path / "v1", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "llama", "llama")
    prompt = "<_user>生抽与老抽的区别？<_bot>"
    expected = transformers_answer(tmp_path / "llama", tokenizer(prompt)["input_ids"], 32)
    answer = ask(tmp_path, "ms/tokenizer.json", prompt, 32)
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    ours = TelechatTokenizer(tmp_path / "ms" / "tokenizer.json")
    assert answer == ours.decode(expected, skip_special_tokens=True)
