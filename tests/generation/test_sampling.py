"""Next tokens: the distribution equals that of transformers, and draws come as often as it says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusal import refused
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from research.telechat2.generation import sampling as rules
from research.telechat2.generation.sampling import (
    Sampling,
    check_finite,
    draw,
    next_token,
    row_generators,
)


def softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


def scores_of(logits, tokens, sampling: Sampling, prompt_length: int = 0) -> np.ndarray:
    return next_token(logits, tokens, prompt_length, sampling, np.random.default_rng(0))[1]


def oracle(logits, tokens, sampling: Sampling) -> np.ndarray:
    """The scores that transformers' chain leaves, in its order, in float64."""
    found, ids = torch.tensor(logits, dtype=torch.float64)[None], torch.tensor(tokens)[None]
    chain = [RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))]
    chain += [TemperatureLogitsWarper(float(sampling.temperature))]
    chain += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for step in chain:
        found = step(ids, found)
    return (found[0] - found.max()).numpy()  # a softmax does not change by it


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(2, 300),
    spread=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 7, 50, 1000]),
    top_p=st.floats(0.001, 1.0),
    temperature=st.sampled_from([0.1, 0.7, 1, 1.5, 4.0]),
    penalty=st.sampled_from([0.5, 1, 1.0, 1.2, 9.0]),
)
def test_what_is_left_to_draw_is_what_transformers_leaves(
    seed, vocabulary, spread, top_k, top_p, temperature, penalty
):
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(vocabulary) * spread).astype(np.float32)
    tokens = random.integers(vocabulary, size=random.integers(1, 20))
    sampling = Sampling(True, temperature, top_k, top_p, penalty)
    before = oracle(logits, tokens, Sampling(True, temperature, top_k, 1.0, penalty))
    cumulated = np.cumsum(np.sort(softmax(before))[::-1])
    assume(np.abs(cumulated - top_p).min() > 1e-9)  # nearer the two may round to different sides
    expected = oracle(logits, tokens, sampling)
    np.testing.assert_allclose(scores_of(logits, tokens, sampling), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_is_that_of_a_small_one(share, monkeypatch):
    """Sorted from its head where that suffices, with thousands of tokens equally likely, and as a whole."""
    random = np.random.default_rng(2)
    for scores in (random.standard_normal(5000) * 3, random.integers(-4, 4, 5000) * 1.0, np.zeros(5000)):
        found = []
        for head in (64, 1024, 10**9):
            monkeypatch.setattr(rules, "_HEAD", head)
            found.append(np.flatnonzero(np.isfinite(rules.top_p(scores, share))))
        np.testing.assert_array_equal(found[0], found[2])
        np.testing.assert_array_equal(found[1], found[2])
        likeliest = np.sort(softmax(scores))[::-1]
        assert likeliest[: len(found[0])].sum() >= share - 1e-9 > likeliest[: len(found[0]) - 1].sum() - 2e-9


def test_the_token_that_crosses_top_p_stays_and_1_is_off():
    """By hand: probabilities 0.5, 0.3, 0.15, 0.05."""
    logits = np.log([0.15, 0.5, 0.05, 0.3]).astype(np.float32)

    def kept(**given):
        return set(np.flatnonzero(np.isfinite(scores_of(logits, [0], Sampling(True, **given)))))

    assert kept() == kept(top_p=1.0) == kept(top_k=0) == kept(top_k=4) == kept(top_k=99) == {0, 1, 2, 3}
    assert kept(top_k=1) == kept(top_p=0.4) == kept(top_p=1e-300) == {1}
    assert kept(top_k=2) == kept(top_p=0.6) == kept(top_p=0.79) == {1, 3}
    assert kept(top_p=0.81) == kept(top_k=3) == {0, 1, 3}
    # top-p counts what top-k leaves: 0.5 of 0.8 is 0.625
    assert kept(top_k=2, top_p=0.62) == {1} and kept(top_k=2, top_p=0.63) == {1, 3}
    assert kept(temperature=0.25, top_p=0.88) == {1, 3}  # fourth powers: 0.879, 0.114, …


@pytest.mark.parametrize(
    "given",
    [
        {}, {"top_k": 2}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9, "temperature": 1.7},
        {"temperature": 0.5, "repetition_penalty": 1.3},
    ],
    ids=str,
)  # fmt: skip
def test_draws_come_as_often_as_the_softmax_says(given):
    """Chi-square of 20000 draws at a fixed seed, below what one run in a million passes."""
    logits = np.random.default_rng(5).standard_normal(12).astype(np.float32) * 2
    sampling, random, count = Sampling(True, **given), np.random.default_rng(1), 20000
    expected = softmax(oracle(logits, [3, 4], sampling)) * count
    found = np.bincount(
        [next_token(logits, [3, 4], 2, sampling, random)[0] for _ in range(count)], minlength=len(logits)
    )
    possible = expected > 0
    assert not found[~possible].any() and possible.sum() > 1
    chi_square = ((found - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = possible.sum() - 1
    assert chi_square < degrees + 7 * math.sqrt(2 * degrees) + 10, (found, expected)


def test_a_greedy_token_is_the_largest_after_the_penalty():
    logits = np.array([2.0, 3.0, -1.0, 1.9], np.float32)
    assert next_token(logits, [1], 1, Sampling(), None)[0] == 1
    assert next_token(logits, [1], 1, Sampling(repetition_penalty=2.0), None)[0] == 0  # 3 / 2
    assert next_token(logits, [0, 1], 2, Sampling(repetition_penalty=2.0), None)[0] == 3
    assert next_token(np.array([-4.0, -3.0]), [1], 1, Sampling(repetition_penalty=2.0), None)[0] == 0
    assert next_token(logits, [1], 1, Sampling(top_k=1, top_p=0.1, temperature=9.0), None)[0] == 1


def test_an_end_token_waits_for_the_smallest_length():
    logits = np.array([2.0, 3.0, 1.0], np.float32)
    three = Sampling(min_new_tokens=3, end_tokens=(1,))
    assert [next_token(logits, range(length), 5, three, None)[0] for length in (5, 7, 8)] == [0, 0, 1]
    six = Sampling(min_length=6, end_tokens=(1, 0))
    assert [next_token(logits, range(length), 5, six, None)[0] for length in (5, 6)] == [2, 1]


def test_a_drawn_token_always_has_a_probability():
    """Where rounding would point behind the last, and where all but one have none."""

    class Largest:
        def random(self):
            return np.nextafter(1.0, 0)

    scores = np.array([-np.inf, 0.0, -800.0, -np.inf])
    assert draw(scores, Largest()) == 1
    assert draw(np.log(np.full(10, 0.1)), Largest()) == 9


def test_rows_draw_for_themselves_in_batches_of_any_size():
    def numbers(sizes, seed=None):
        np.random.seed(7)
        return [generator.random() for size in sizes for generator in row_generators(size, seed)]

    assert numbers([5]) == numbers([2, 3]) == numbers([1] * 5) and len(set(numbers([5]))) == 5
    assert numbers([3], seed=1) == numbers([3], seed=1) != numbers([3], seed=2)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [0, 0.0, -1.0, math.nan, math.inf, "0.7", True]),
        ("top_k", [-1, 2.5, 3.0, math.nan, math.inf, "3", True]),
        ("top_p", [0, 0.0, -0.1, 1.01, 2, math.nan, math.inf, -math.inf, "0.9", True]),
        ("repetition_penalty", [0, -1.2, math.nan, math.inf, "1.1", False]),
        ("do_sample", ["False", "True", 1, 0]),
    ],
)
def test_settings_that_are_none_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError) as told:
            Sampling(**{name: value})
        assert name in str(told.value) and repr(value) in str(told.value)


def test_settings_that_are_some_are_taken():
    for values in (
        {"temperature": 1}, {"temperature": 1e-9}, {"top_k": np.int64(3)}, {"top_p": 1}, {"top_p": 1e-9},
        {"repetition_penalty": np.float32(1.1)}, {"repetition_penalty": 0.5}, {"top_k": 10**9},
    ):  # fmt: skip
        Sampling(**values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    logits = np.zeros(7, np.float32)
    check_finite(logits, 1, 1)
    logits[3] = value
    counts = f"{int(math.isnan(value))} of 7 are NaN", f"{int(math.isinf(value))} infinite"
    with refused("token 4", "row 2 of 3", "position 19", *counts):
        check_finite(logits, 4, 19, row=1, rows=3)


@pytest.mark.parametrize("temperature", [1e-9, 5e-324, 1e300])
def test_extreme_temperatures_still_draw(temperature):
    """Near 0 the likeliest, even where the quotient overflows; near infinity any."""
    logits = np.array([1.0, 2.0, 30.0, 29.9], np.float32)
    random = np.random.default_rng(0)
    found = {next_token(logits, [0], 1, Sampling(True, temperature), random)[0] for _ in range(200)}
    assert found == ({2} if temperature < 1 else {0, 1, 2, 3})
