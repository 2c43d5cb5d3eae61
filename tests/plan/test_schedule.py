"""The pipeline's schedule: bubble and activations in flight are those of Narayanan et al. 2021."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused

from research.telechat2.plan.estimate.schedule import schedule

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_equal_stages_idle_for_one_pass_of_each_other_stage(sizes):
    stages, chunks, rounds = sizes
    chunks = chunks if stages > 1 else 1
    micro_batches = stages * rounds
    forward, backward = 1.0, 2.0
    found = schedule(
        [[forward / chunks] * stages] * chunks, [[backward / chunks] * stages] * chunks, micro_batches
    )
    idle = (stages - 1) * (forward + backward) / chunks
    assert found.seconds == pytest.approx(micro_batches * (forward + backward) + idle)
    assert found.bubble == pytest.approx(idle / found.seconds)


@given(SIZES, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_pass_waits_for_its_operands_and_for_its_stage(sizes, random):
    stages, chunks, rounds = sizes
    chunks = chunks if stages > 1 else 1
    times = [[[random.uniform(0.1, 3) for _ in range(stages)] for _ in range(chunks)] for _ in range(2)]
    found = schedule(*times, stages * rounds)
    ends = {step[:4]: step.end for step in found.passes}
    assert len(ends) == 2 * stages * chunks * stages * rounds
    free = [0.0] * stages
    for step in found.passes:
        assert step.start >= free[step.stage]
        free[step.stage] = step.end
        chain = step.chunk * stages + step.stage  # of the stages one after the other
        for way, before in ((True, chain - 1), (False, chain + 1)):
            if way == step.forward and 0 <= before < chunks * stages:
                assert step.start >= ends[before % stages, way, before // stages, step.micro_batch]
        if not step.forward:
            assert step.start >= ends[step.stage, True, step.chunk, step.micro_batch]


def test_1f1b_keeps_as_many_micro_batches_as_stages_follow():
    found = schedule([[1.0] * 4], [[2.0] * 4], 8)
    assert found.in_flight == ((4, 3, 2, 1),)


def test_chunks_keep_more_on_the_first_stage():
    """2(p - 1) + (v - 1)p + 1 runs of layers of the first of p stages, of v chunks: 23 for p = 8, v = 2."""
    found = schedule([[1.0] * 8] * 2, [[2.0] * 8] * 2, 32)
    assert [sum(stage) for stage in zip(*found.in_flight, strict=True)] == [23 - 2 * s for s in range(8)]


def test_micro_batches_that_no_schedule_is_known_for_are_refused():
    with refused("micro_batch_num is 6", "pipeline_stage 4", "micro_batch_num to 8"):
        schedule([[1.0] * 4] * 2, [[1.0] * 4] * 2, 6)
