"""The small model that is asked: its YAML, its questions, and the oracle's answers to them."""

from pathlib import Path

import yaml

from research.telechat2.data.conversions import Conversation

CHECKOUT = Path(__file__).resolve().parents[2]
SIZES = {
    "hidden_size": 64, "n_layer": 2, "n_head": 4, "num_key_value_heads": 2, "ffn_hidden_size": 96,
    "vocab_size": 600,
}  # fmt: skip
SEQ_LENGTH, BLOCK_SIZE, NUM_BLOCKS, NEW_TOKENS = 256, 16, 64, 12
END = 2
QUESTIONS = ["生抽与老抽的区别？", "What is the weather in Beijing today?", "x"]


def write_yaml(path: Path, model_config: dict | None = None, **sections) -> Path:
    """A predict YAML of SIZES over the shipped base, on a CPU."""
    sizes = {
        "seq_length": SEQ_LENGTH, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2,
        "intermediate_size": 96, "vocab_size": 600, "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS,
        "compute_dtype": "float32", "param_init_type": "float32", "rotary_dtype": "float32",
        "res_dtype": "float32",
    }  # fmt: skip
    content = {
        "base_config": str(CHECKOUT / "research" / "telechat2" / "telechat2-base" / "predict.yaml"),
        "model": {"model_config": sizes | (model_config or {})},
        "context": {"device_target": "CPU", "jit_config": {"jit_level": "O0"}},
    }
    path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
    return path


def asked(text: str) -> Conversation:
    return Conversation([{"role": "user", "content": text}], None, "chat")


def oracle_answer(random, prompt: list[int], count: int, end: int = END) -> list[int]:
    import torch

    tokens = torch.tensor([prompt])
    found = random.oracle.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False,
        eos_token_id=end, pad_token_id=3,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()
