"""A Chinese text beyond the trained length as prompt, read in pieces, answered as the oracle does."""

import json

import numpy as np
import pytest
import torch
from model_fixtures import RandomModel
from rope_oracle import with_exact_dynamic_ntk

from research.telechat2.telechat_tokenizer import TelechatTokenizer

NEW_TOKENS = 5


def assert_answered_as_by_the_oracle(folder, ids: list[int], vocab_size: int, trained: int, chunk: int):
    """Greedy answer and logits of a model that was trained at half of ``seq_length``."""
    random = RandomModel(
        folder, seed=21, hidden_size=64, n_head=1, n_layer=2, ffn_hidden_size=96, vocab_size=vocab_size
    )
    assert trained < len(ids) < 2 * trained - NEW_TOKENS
    model = random.build(
        seq_length=2 * trained, max_position_embedding=trained, extend_method="DYNAMIC_NTK", use_past=True,
        block_size=16, num_blocks=2 * trained // 16, prefill_chunk=chunk,
    )  # fmt: skip
    answer = model.generate(
        [ids], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[-1], pad_token_id=-2,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = answer.sequences[0].tolist()
    assert tokens[: len(ids)] == ids and len(tokens) == len(ids) + NEW_TOKENS
    oracle = with_exact_dynamic_ntk(random.oracle, len(tokens), trained)
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens[:-1]]), logits_to_keep=NEW_TOKENS).logits[0].numpy()
    found = np.concatenate([logits.reshape(1, -1) for logits in answer.logits])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert tokens[len(ids) :] == expected.argmax(-1).tolist()


def test_a_text_beyond_the_trained_length(small_tokenizer, tmp_path):
    text = "生抽与老抽的区别？生抽的颜色比较淡，而老抽的颜色较深。你能告诉我什么是人工智能吗？" * 40
    ids = small_tokenizer(text)["input_ids"][:200]
    assert_answered_as_by_the_oracle(tmp_path, ids, len(small_tokenizer), trained=128, chunk=48)


@pytest.mark.slow
def test_a_text_of_12000_tokens_to_a_model_trained_at_8192(shared_data, tmp_path):
    (vocab,) = sorted(shared_data.rglob("tokenizer.model"))[:1]
    tokenizer = TelechatTokenizer(vocab)
    lines = (
        json.loads(line)
        for file in sorted(shared_data.rglob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    )
    text = "".join(str(value) for line in lines for value in line.values())
    ids = tokenizer(text[:60_000])["input_ids"][:12_000]
    assert len(ids) == 12_000
    assert_answered_as_by_the_oracle(tmp_path, ids, tokenizer.vocab_size, trained=8192, chunk=128)
