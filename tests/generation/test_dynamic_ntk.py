"""Dynamic NTK: every request has its own rotary factor for its whole life, and answers as the oracle does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_fixtures import PAD, RandomModel, generate, int32, prompts
from refusal import refused
from rope_oracle import with_dynamic_ntk

from research.telechat2.config.generation_limits import GenerationLimits
from research.telechat2.generation.answer import Clock, Stopped
from research.telechat2.infer import predictor as predictor_module
from research.telechat2.infer.predictor import Predictor
from research.telechat2.infer.telechat import ParallelTelechatForCausalLM

TRAINED, SEQ_LENGTH, BLOCK_SIZE, VOCAB = 32, 128, 4, 256
NTK = {"extend_method": "DYNAMIC_NTK", "max_position_embedding": TRAINED, "seq_length": SEQ_LENGTH}
CACHE = {"use_past": True, "block_size": BLOCK_SIZE, "num_blocks": 120}


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return RandomModel(
        tmp_path_factory.mktemp("ntk"), seed=5, hidden_size=128, n_head=2, num_key_value_heads=1, n_layer=2,
        ffn_hidden_size=192, vocab_size=VOCAB,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(random):
    return random.build(**NTK, **CACHE)


def oracles_answer(random, row: list[int], new_tokens: int, reach: int) -> list[int]:
    """The oracle's greedy answer with the factor of ``reach`` tokens, one full forward for each token."""
    oracle = with_dynamic_ntk(random.oracle, reach, TRAINED)
    tokens = list(row)
    for _ in range(new_tokens):
        with torch.no_grad():
            tokens.append(int(oracle(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def test_rows_of_a_batch_have_their_own_factors(random, model):
    """Alphas 1, 3 and 7, and one row whose answer grows over the trained length: each as if asked alone."""
    rows = prompts(1, VOCAB, 7, 40, 100, 25)
    found = generate(model, rows, max_new_tokens=20)
    assert found == [oracles_answer(random, row, 20, len(row) + 20) for row in rows]
    assert [generate(model, [row], max_new_tokens=20)[0] for row in rows[:2]] == found[:2]


def test_long_then_short_gives_the_short_answer(random, model):
    """The same blocks of the cache, first under another factor."""
    long, short = prompts(2, VOCAB, 101, 6)
    first = generate(model, [short], max_new_tokens=10)
    generate(model, [long], max_new_tokens=10)
    assert generate(model, [short], max_new_tokens=10) == first == [oracles_answer(random, short, 10, 16)]


def test_an_answer_that_is_stopped_leaves_no_factor_behind(random, model):
    """Ctrl-C in a long answer; then a short one, which takes the same blocks of the cache."""
    long, short = prompts(2, VOCAB, 101, 6)
    clock = Clock(stop=lambda: len(clock.tokens) == 3)
    with pytest.raises(Stopped):
        model.generate(np.array([long]), max_new_tokens=10, streamer=clock)
    assert clock.tokens == oracles_answer(random, long, 3, 111)[-3:]
    assert generate(model, [short], max_new_tokens=10) == [oracles_answer(random, short, 10, 16)]


def test_max_length_limits_prompt_and_answer_together(random, model):
    (row,) = prompts(3, VOCAB, 30)
    for limit in (32, 33):
        found = model.generate([row], max_length=limit, do_sample=False, eos_token_id=[-1], pad_token_id=PAD)
        assert found[0].tolist() == oracles_answer(random, row, limit - 30, limit)


def test_the_commands_limit_each_row_by_itself(random, model, monkeypatch):
    """They give a batch the max_new_tokens of its shortest prompt, which is not the other rows' limit."""
    silent = SimpleNamespace(put=lambda index: "", end=lambda: "")  # random ids spell nothing
    monkeypatch.setattr(predictor_module, "StreamDecoder", lambda vocabulary: silent)
    predictor = Predictor(
        model, SimpleNamespace(pad_token_id=PAD, vocabulary=None), "plain", GenerationLimits(64)
    )
    rows = prompts(9, VOCAB, 44, 58)
    for row, answer in zip(rows, predictor.generate(rows), strict=True):
        assert row + answer.ids == oracles_answer(random, row, len(answer.ids), 64)


def test_the_parallel_model_has_the_same_factors(random, model):
    rows = prompts(11, VOCAB, 50, 9)
    parallel = ParallelTelechatForCausalLM(random.config(**NTK, **CACHE, qkv_concat=True))
    parallel.load_weights(random.hf)
    found = generate(parallel.set_train(False), rows, max_new_tokens=16)
    assert found == generate(model, rows, max_new_tokens=16)


def steps(model, rows: list[list[int]], decoded: int) -> list[np.ndarray]:
    """Logits ``[B, V]`` of a prefill of each row but its last ``decoded`` tokens, then of reading those.

    Every row has the blocks of all its tokens from the beginning, as an engine reserves them.
    """
    tables = np.full((len(rows), SEQ_LENGTH // BLOCK_SIZE), -1, np.int32)
    free = iter(np.random.default_rng(0).permutation(CACHE["num_blocks"]))
    for row, table in zip(rows, tables, strict=True):
        needed = -(-len(row) // BLOCK_SIZE)
        table[:needed] = [next(free) for _ in range(needed)]
    padded = np.full((len(rows), SEQ_LENGTH), PAD)
    for row, ids in zip(rows, padded, strict=True):
        ids[: len(row)] = row
    slots = tables[:, np.arange(SEQ_LENGTH) // BLOCK_SIZE] * BLOCK_SIZE + np.arange(SEQ_LENGTH) % BLOCK_SIZE
    found = []
    for step in range(decoded + 1):
        lengths = np.array([len(row) - decoded + step for row in rows])
        valid = np.arange(SEQ_LENGTH) < lengths[:, None]
        logits, _ = model.forward(
            padded, lengths, block_tables=tables, prefill=step == 0, use_past=True,
            slot_mapping=np.where(valid, slots, -1).reshape(-1) if step == 0
            else slots[np.arange(len(rows)), lengths - 1],
        )  # fmt: skip
        found.append(logits.asnumpy())
    return found


def test_logits_beyond_the_trained_length_equal_the_oracles_full_forward(random, model):
    """As an engine drives it, that says no limit: the factor is that of the blocks it reserved."""
    lengths = (12, 64, 118)
    rows = prompts(4, VOCAB, *lengths)
    model.set_dynamic_inputs()
    found = steps(model, rows, decoded=6)
    for index, row in enumerate(rows):
        reserved = -(-len(row) // BLOCK_SIZE) * BLOCK_SIZE
        with torch.no_grad():
            oracle = with_dynamic_ntk(random.oracle, reserved, TRAINED)
            expected = oracle(torch.tensor([row])).logits[0].numpy()
        for step, logits in enumerate(found):
            np.testing.assert_allclose(logits[index], expected[len(row) - 7 + step], rtol=0, atol=2e-5)


def test_within_the_trained_length_no_bit_differs_from_no_extension(random, model):
    rows = prompts(6, VOCAB, 5, TRAINED)
    plain = random.build(seq_length=SEQ_LENGTH, **CACHE)
    for each in (model, plain):
        each.set_dynamic_inputs()
    for found, expected in zip(steps(model, rows, 3), steps(plain, rows, 3), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_training_takes_the_factor_of_seq_length(random):
    ids = np.random.default_rng(7).integers(4, VOCAB, (2, 81))
    model = random.build(**NTK | {"seq_length": 80})
    loss = model.set_train(True)(int32(ids)).asnumpy()
    oracle = with_dynamic_ntk(random.oracle, 80, TRAINED)
    with torch.no_grad():
        expected = oracle(torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    np.testing.assert_allclose(loss[0], expected, rtol=1e-5)
    logits = model.set_train(False)(int32(ids))[0].asnumpy()  # evaluation reads the last token too
    with torch.no_grad():
        np.testing.assert_allclose(logits, oracle(torch.tensor(ids)).logits.numpy(), rtol=0, atol=2e-5)


def test_prediction_without_a_cache_is_refused(random):
    with refused("use_past", False, "DYNAMIC_NTK", "use_past: True"):
        generate(random.build(**NTK), prompts(8, VOCAB, 5), max_new_tokens=2)
