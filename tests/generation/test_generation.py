"""``generate`` of MindFormers with our model, greedy, token by token against the oracle's."""

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor
from model_fixtures import RandomModel, generate, oracle_generate, prompts
from refusal import refused

from research.telechat2.generation.step_inputs import step_inputs
from research.telechat2.model.kernels.select import ReferenceKernels
from research.telechat2.telechat_config import TelechatConfig

SEQ_LENGTH, VOCAB = 48, 256
SIZES = {
    "hidden_size": 128, "n_head": 2, "num_key_value_heads": 1, "n_layer": 2,
    "ffn_hidden_size": 192, "vocab_size": VOCAB,
}  # fmt: skip
MODES = {
    "paged": {"use_past": True, "block_size": 4, "num_blocks": 40},
    "paged-fixed": {"use_past": True, "is_dynamic": False, "block_size": 4, "num_blocks": 40},
    "no-cache": {"use_past": False},
}


@pytest.fixture(scope="module")
def randoms(tmp_path_factory):
    return [RandomModel(tmp_path_factory.mktemp(f"seed{seed}"), seed=seed, **SIZES) for seed in range(3)]


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES)
def model(request, randoms):
    return randoms[0].build(seq_length=SEQ_LENGTH, **request.param)


@pytest.fixture
def use(model):
    """Give the compiled model another seed's weights."""

    def load(random):
        weights = {name: Parameter(Tensor(array)) for name, array in random.tensors()}
        missing, foreign = ms.load_param_into_net(model, weights)
        assert not foreign and all(name.endswith("_cache") for name in missing)
        return model

    return load


@pytest.mark.parametrize("seed", range(3))
def test_greedy_answers_equal_the_oracles(use, randoms, seed):
    """Unequal prompts in one batch, one of them a single token: each answer is that of the prompt alone."""
    rows = prompts(seed, VOCAB, 7, 1, 18)
    found = generate(use(randoms[seed]), rows, max_new_tokens=16)
    assert found == [oracle_generate(randoms[seed], row, 16) for row in rows]


def test_a_row_that_ends_does_not_change_the_others(use, randoms):
    rows = prompts(10, VOCAB, 6, 9)
    eos = oracle_generate(randoms[0], rows[0], 3)[-1]
    expected = [oracle_generate(randoms[0], row, 12, eos=eos) for row in rows]
    assert len(expected[0]) <= 9 < 21 == len(expected[1])  # the first stops early, the second runs on
    assert generate(use(randoms[0]), rows, max_new_tokens=12, eos=eos) == expected


def test_blocks_used_again_leave_no_trace(use, randoms):
    """Calls of other sizes in between; all blocks have been used by the time the first prompt returns."""
    model = use(randoms[1])
    calls = [
        prompts(20, VOCAB, 11),
        prompts(21, VOCAB, 30, 2, 17),
        prompts(22, VOCAB, 5, 25),
        prompts(20, VOCAB, 11),
    ]
    found = [generate(model, rows, max_new_tokens=14) for rows in calls]
    assert found == [[oracle_generate(randoms[1], row, 14) for row in rows] for rows in calls]
    assert found[0] == found[3]


def test_weights_that_are_no_numbers_are_an_error(use, randoms):
    """At the step that meets them: here the token that is drawn first has a broken embedding."""
    (row,) = prompts(40, VOCAB, 9)
    model = use(randoms[0])
    first, second = oracle_generate(randoms[0], row, 2)[-2:]
    assert first not in row
    weight = model.model.tok_embeddings.embedding_weight
    sound = weight.asnumpy().copy()
    broken = sound.copy()
    broken[first, 3] = np.nan
    weight.set_data(Tensor(broken))
    try:
        with refused("token 2", "position 10", "256 of 256"):
            generate(model, [row], max_new_tokens=4)
    finally:
        weight.set_data(Tensor(sound))
    assert generate(model, [row], max_new_tokens=2) == [[*row, first, second]]


def test_a_prompt_one_short_of_seq_length_gets_one_token(use, randoms):
    (row,) = prompts(30, VOCAB, SEQ_LENGTH - 1)
    expected = oracle_generate(randoms[2], row, 1)
    model = use(randoms[2])
    assert generate(model, [row], max_new_tokens=1) == [expected]
    answer = model.generate([row], max_length=SEQ_LENGTH, do_sample=False, eos_token_id=[-1])
    assert answer[0].tolist() == expected


CONFIG = TelechatConfig(hidden_size=32, num_heads=2, num_layers=1, vocab_size=64, seq_length=32, block_size=4)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=5), is_dynamic=st.booleans(), data=st.data())
def test_a_step_holds_every_token_once(lengths, is_dynamic, data):
    """The host's side for any batch: what a graph gets for prefill, and for the decode step after it."""
    config = TelechatConfig(**(CONFIG.to_dict() | {"is_dynamic": is_dynamic}))
    order = data.draw(st.permutations(range(40)))
    tables = np.array(order, np.int32).reshape(5, 8)[: len(lengths)]
    ids = np.arange(32 * len(lengths)).reshape(-1, 32)  # every token unique
    slots = tables[:, np.arange(32) // 4] * 4 + np.arange(32) % 4
    valid = np.arange(32) < np.array(lengths)[:, None]
    prefill_slots = np.where(valid, slots, -1)
    step = step_inputs(
        config, ReferenceKernels(), None, ids, prefill=True, valid_length_each_example=np.array(lengths),
        block_tables=tables, slot_mapping=prefill_slots.reshape(-1), origin_inputs=None,
    )  # fmt: skip
    total = sum(lengths)
    tokens, positions = step["input_ids"].asnumpy(), step["position_ids"].asnumpy()
    assert tokens.shape == (1, len(positions)) and len(positions) >= total
    np.testing.assert_array_equal(tokens[0, :total], ids[valid])
    np.testing.assert_array_equal(positions[:total], np.nonzero(valid)[1])
    np.testing.assert_array_equal(step["slot_mapping"].asnumpy()[:total], slots[valid])
    assert np.all(step["slot_mapping"].asnumpy()[total:] == -1)  # padding is written nowhere
    assert is_dynamic == (len(positions) == total) or total in (16, 32, 64, 128)
    last = [ids[row, length - 1] for row, length in enumerate(lengths)]
    np.testing.assert_array_equal(tokens[0, step["last_token"].asnumpy()], last)

    now = np.array([slots[row, length - 1] for row, length in enumerate(lengths)])
    step = step_inputs(
        config, ReferenceKernels(), None, ids, prefill=False, valid_length_each_example=np.array(lengths),
        block_tables=tables, slot_mapping=now,
    )  # fmt: skip
    np.testing.assert_array_equal(step["input_ids"].asnumpy(), np.array(last).reshape(-1, 1))
    np.testing.assert_array_equal(step["position_ids"].asnumpy(), np.array(lengths) - 1)
    np.testing.assert_array_equal(step["slot_mapping"].asnumpy(), now)
    found = step["block_tables"].asnumpy()
    needed = -(-max(lengths) // 4)
    assert found.shape[1] >= needed
    np.testing.assert_array_equal(found, tables[:, : found.shape[1]])
