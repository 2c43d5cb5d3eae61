"""The host's account of rotary factors: what an engine's block tables say about each request's life."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from research.telechat2.generation.rotary_lengths import RequestLengths
from research.telechat2.generation.step_inputs import step_inputs
from research.telechat2.model.kernels.select import ReferenceKernels
from research.telechat2.telechat_config import TelechatConfig


def config_of(**more) -> TelechatConfig:
    return TelechatConfig(
        hidden_size=32, num_heads=2, seq_length=64, max_position_embedding=16, block_size=4, use_past=True,
        extend_method="DYNAMIC_NTK", **more,
    )  # fmt: skip


def tables(*rows) -> np.ndarray:
    return np.array([list(row) + [-1] * (16 - len(row)) for row in rows], np.int32)


def test_an_engine_that_names_no_limit_gets_the_factor_of_the_blocks_it_reserved():
    requests = RequestLengths(config_of())
    found = requests.of_rows(True, [5, 9], tables([7, 3, 2], [1, 0, 4]))
    assert found.tolist() == [12, 12] and found.dtype == np.int32
    # more blocks later, another order of the rows, one of them gone: each keeps its own
    assert requests.of_rows(False, [10, 13], tables([1, 0, 4], [7, 3, 2, 5])).tolist() == [12, 12]
    assert requests.of_rows(True, [16], tables(range(8, 16))).tolist() == [32]
    assert requests.of_rows(False, [13, 17], tables([7, 3, 2, 5], range(8, 16))).tolist() == [12, 32]


def test_a_prefill_in_the_first_block_of_another_request_ends_that():
    requests = RequestLengths(config_of())
    requests.of_rows(True, [40], tables(range(10)))
    assert requests.of_rows(True, [3], tables([0])).tolist() == [4]
    assert requests.of_rows(False, [4], tables([0])).tolist() == [4]


def test_what_is_read_from_a_later_position_on_keeps_the_factor_of_its_beginning():
    """The second piece of a prompt, and a request that shares another's first blocks."""
    requests = RequestLengths(config_of())
    requests.of_rows(True, [8], tables([3, 4]), longest=[48])
    assert requests.of_rows(False, [16], tables([3, 4, 5, 6])).tolist() == [48]
    assert requests.of_rows(True, [4], tables([8])).tolist() == [4]
    assert requests.of_rows(False, [12, 5], tables([3, 4, 9], [8, 2])).tolist() == [48, 4]


def test_a_prompt_begun_beside_decoding_rows_has_its_own_factor():
    """Its first block had another owner, the other row's first block has not."""
    requests = RequestLengths(config_of())
    requests.of_rows(True, [40, 8], tables(range(10), [10, 11]), longest=[60, 20])
    step = step_inputs(
        config_of(), ReferenceKernels(), requests, np.zeros((2, 64), np.int32), prefill=False,
        valid_length_each_example=[3, 9], block_tables=tables([0, 5], [10, 11, 12]), slot_mapping=np.zeros(4),
        starts=np.array([0, 8]), longest=[32, 64],
    )  # fmt: skip
    assert step["rotary_lengths"].asnumpy().tolist() == [32, 32, 32, 20]


def test_a_request_whose_beginning_was_not_seen_is_refused():
    requests = RequestLengths(config_of())
    with refused("first block is 5", "DYNAMIC_NTK"):
        requests.of_rows(False, [4], tables([5]))
    assert requests.of_rows(False, [1], tables([])).tolist() == [0]  # padding of a batch has no block


def test_by_prompt_an_engines_blocks_do_not_count():
    requests = RequestLengths(config_of(extend_by_prompt=True))
    assert requests.of_rows(True, [14, 20], tables(range(8), range(8, 16))).tolist() == [14, 20]
    assert requests.of_rows(False, [31, 21], tables(range(8), range(8, 16))).tolist() == [14, 20]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_every_token_of_a_step_is_rotated_by_its_own_requests_factor(lengths):
    config = config_of()
    requests = RequestLengths(config)
    blocks = np.arange(16 * len(lengths), dtype=np.int32).reshape(len(lengths), 16)
    slots = np.where(np.arange(64) < np.array(lengths)[:, None], 0, -1).reshape(-1)
    common = {"block_tables": blocks, "slot_mapping": slots}
    model = config, ReferenceKernels(), requests
    ids, longest = np.zeros((len(lengths), 64), np.int32), [length + 4 for length in lengths]
    step = step_inputs(
        *model, ids, prefill=True, valid_length_each_example=lengths, longest=longest, **common
    )
    expected = [length + 4 for length in lengths for _ in range(length)]
    assert step["rotary_lengths"].asnumpy().tolist() == expected
    step = step_inputs(
        *model, ids, prefill=False, valid_length_each_example=[n + 1 for n in lengths], **common
    )
    assert step["rotary_lengths"].asnumpy().tolist() == longest
