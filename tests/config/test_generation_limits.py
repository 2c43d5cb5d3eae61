"""Lengths of prompt and answer, and the blocks that they need, counted by hand."""

from types import SimpleNamespace

import pytest
from refusal import refused

from research.telechat2.config.generation_limits import GenerationLimits


def model(**more) -> SimpleNamespace:
    values = {"seq_length": 64, "max_decode_length": 30, "use_past": True, "block_size": 8, "num_blocks": 4}
    return SimpleNamespace(**values | more)


@pytest.mark.parametrize(
    "asked, more, ends",
    [
        ({"max_new_tokens": 8}, {}, [11, 48, 64]),
        ({}, {}, [30, 40, 60]),
        ({}, {"max_decode_length": 99}, [64, 64, 64]),
        ({"max_length": 50, "max_new_tokens": 15}, {}, [18, 50]),
    ],
)
def test_the_tokens_at_which_a_row_ends(asked, more, ends):
    limits = GenerationLimits.of(model(**more), **asked)
    assert [limits.end(prompt) for prompt in (3, 40, 60)][: len(ends)] == ends
    assert limits.room(3) == ends[0] - 3


@pytest.mark.parametrize(
    "asked, more, source",
    [
        ({}, {}, "max_decode_length"),
        ({}, {"max_decode_length": 64}, "seq_length"),
        ({"max_new_tokens": 7}, {}, "seq_length"),
        ({"max_length": 50, "max_new_tokens": 7}, {}, "--max_length"),
    ],
)
def test_a_prompt_that_leaves_no_room_is_refused_by_the_setting_that_limits_it(asked, more, source):
    limits = GenerationLimits.of(model(**more), **asked)
    limits.check_prompt(limits.max_length - 1)
    with refused(limits.max_length, source):
        limits.check_prompt(limits.max_length)


def test_more_than_the_model_can_is_refused():
    with refused(65, 64, "seq_length"):
        GenerationLimits.of(model(), max_length=65)


def test_the_last_token_of_a_row_takes_no_block():
    limits = GenerationLimits.of(model(), max_new_tokens=9)
    limits.check_cache([8, 8])  # 16 of 17 tokens each: two blocks
    with refused("5 blocks", "8 tokens", 4, "num_blocks"):
        limits.check_cache([8, 9])
    GenerationLimits.of(model(use_past=False), max_new_tokens=9).check_cache([60, 60])
