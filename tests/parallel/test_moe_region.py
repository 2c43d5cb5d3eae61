"""Experts on many devices give what one device gives: the cells themselves, by NumPy, on simulated ranks."""

import math
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_ranks import World, numpy_cells, swiglu
from oracle_moe import RULES, capacity, moe_block, route

from research.telechat2.config.moe import MoESettings
from research.telechat2.model.kernels.ascend import DroplessExpertsFused, GroupedMatMulTransposed
from research.telechat2.model.kernels.moe_dispatch import CapacityExperts
from research.telechat2.model.kernels.select import ReferenceKernels
from research.telechat2.model.moe import ExpertBlock
from research.telechat2.parallel.experts import DroplessExchange, ExpertExchange, ExpertPlan, SentExperts

HIDDEN = 6
# (ep_extend_tp, sequence_parallel)
LAYOUTS = {"experts": (True, True), "widths": (False, True), "widths-of-the-same-tokens": (False, False)}


def plans(matrix: tuple[int, int, int], layout: str, stages: int = 1) -> list[ExpertPlan]:
    """Of every rank, stage after stage."""
    return [ExpertPlan(*matrix, *LAYOUTS[layout], rank) for rank in range(stages * math.prod(matrix))]


def cut(array: np.ndarray, layout, rank: int) -> np.ndarray:
    """The slice of the whole that a MindSpore layout puts on the rank of a stage."""
    layout = layout.to_dict()
    matrix = layout["device_matrix"]
    place = np.unravel_index(rank % math.prod(matrix), matrix)
    for axis, splits in enumerate(layout["tensor_map"]):
        part = parts = None
        for split in splits if isinstance(splits, tuple) else (splits,):
            if split >= 0:
                size, index = matrix[-1 - split], int(place[-1 - split])
                part, parts = (part or 0) * size + index, (parts or 1) * size
        if parts:
            array = np.split(array, parts, axis)[part]
    return array


def random_weights(rng, num_experts: int, width: int) -> dict:
    """Under the names of ``moe_block``; the biases are nothing small."""
    shapes = {
        "router": (num_experts, HIDDEN), "w1": (num_experts, width, HIDDEN),
        "w3": (num_experts, width, HIDDEN), "w2": (num_experts, HIDDEN, width), "b2": (num_experts, HIDDEN),
    }  # fmt: skip
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def operands(plan: ExpertPlan, x, weights: dict) -> list[np.ndarray]:
    """What the region gives this rank."""
    rows, columns = plan.weight_layouts()
    layouts = plan.layout(plan.token_axes, "None"), plan.layout("None", "None"), rows, rows, columns
    whole = [x, *(weights[name] for name in ("router", "w1", "w3", "w2"))]
    local = [cut(array, layout, plan.rank) for array, layout in zip(whole, layouts, strict=True)]
    return [*local, weights["b2"][None, :, None]]


def settings_of(num_experts: int, top_k: int, factor: float = 0.0, rule: str = "k-major") -> MoESettings:
    return MoESettings(
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=factor,
        token_major=rule == "token-major",
        balance_factor=0.0,
        ep_extend_tp=True,
    )


def block_of(plan: ExpertPlan, moe: MoESettings) -> ExpertBlock:
    """As shard_experts makes it, before the region is put around it."""
    if moe.capacity_factor:
        experts = CapacityExperts(moe, swiglu)
        experts.exchange = ExpertExchange(plan, moe.num_experts)
    else:
        experts = DroplessExpertsFused(moe, swiglu)
        if plan.owners > 1:
            experts = DroplessExchange(plan, experts, moe.num_experts, moe.top_k, HIDDEN)
    config = SimpleNamespace(moe=moe, compute_dtype=ms.float32)
    return ExpertBlock(config, ReferenceKernels, experts, moe.capacity_factor > 0)


def run_block(all_plans: list[ExpertPlan], moe: MoESettings, x, weights: dict) -> list:
    """(y, shares) of every rank; every stage gets the same tokens."""
    world = World(len(all_plans))
    with numpy_cells(world):
        return world.run(
            lambda rank: block_of(all_plans[rank], moe).construct(*operands(all_plans[rank], x, weights))
        )


# --- groups -------------------------------------------------------------------------------------------------

matrices = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(matrix=matrices, layout=st.sampled_from(sorted(LAYOUTS)), stages=st.integers(1, 3))
def test_groups_partition_each_stage_and_hold_what_they_are_to(matrix, layout, stages):
    every = plans(matrix, layout, stages)
    size = math.prod(matrix)
    num_experts, width = 2 * every[0].owners, 3 * every[0].width_parts
    weight = np.arange(num_experts * width).reshape(num_experts, width, 1)
    held = [cut(weight, plan.weight_layouts()[0], plan.rank) for plan in every]
    for plan in every:
        owners, widths = plan.owner_ranks(), plan.width_ranks()
        assert len(owners) == plan.owners and len(widths) == plan.model_parallel
        for group, groups in ((owners, ExpertPlan.owner_ranks), (widths, ExpertPlan.width_ranks)):
            assert plan.rank in group and group == sorted(group)
            assert all(other // size == plan.rank // size for other in group)
            assert all(groups(every[other]) == group for other in group)
        # Owner i has the i-th experts, of the same part of their widths.
        np.testing.assert_array_equal(
            np.concatenate([held[rank] for rank in owners]),
            weight if plan.width_parts == 1 else cut(weight, plan.layout("None", "width", "None"), plan.rank),
        )
        if plan.width_parts > 1:  # and together the width ranks have their experts' whole widths
            np.testing.assert_array_equal(
                np.concatenate([held[rank] for rank in widths], 1),
                cut(weight, plan.layout("owner", "None", "None"), plan.rank),
            )


# --- what tokens become -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=st.sampled_from(sorted(LAYOUTS)), rule=st.sampled_from(RULES))
def test_with_a_capacity_each_device_drops_by_its_own_tokens(data, layout, rule):
    matrix = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)), label="matrix")
    every = plans(matrix, layout, data.draw(st.integers(1, 2), label="stages"))
    plan = every[0]
    num_experts = plan.owners * data.draw(st.integers(1, 2), label="own experts")
    top_k = data.draw(st.integers(1, num_experts), label="k")
    tokens = data.draw(st.integers(1, 6), label="tokens of a device")
    factor = data.draw(st.sampled_from([0.3, 1.0, 1.2, float(num_experts)]), label="factor")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="seed"))
    weights = random_weights(rng, num_experts, plan.width_parts * data.draw(st.integers(1, 3)))
    x = rng.standard_normal((tokens * plan.token_parts, HIDDEN)) + 0.5
    moe = settings_of(num_experts, top_k, factor, rule)
    for rank, (y, shares) in enumerate(run_block(every, moe, x, weights)):
        own = cut(x, plan.layout(plan.token_axes, "None"), rank)
        np.testing.assert_allclose(y, moe_block(own, weights, top_k, factor, rule), rtol=1e-9, atol=1e-12)
        assert_shares(shares, own, weights, moe)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_dropless_devices_together_are_one_device(data):
    matrix = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)), label="matrix")
    every = plans(matrix, "experts", data.draw(st.integers(1, 2), label="stages"))
    plan = every[0]
    num_experts = plan.owners * data.draw(st.integers(1, 3), label="own experts")
    top_k = data.draw(st.integers(1, num_experts), label="k")
    tokens = data.draw(st.integers(1, 5), label="tokens of a device")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="seed"))
    weights = random_weights(rng, num_experts, 3)
    x = rng.standard_normal((tokens * plan.token_parts, HIDDEN)) + 0.5
    expected = moe_block(x, weights, top_k)
    for rank, (y, shares) in enumerate(run_block(every, settings_of(num_experts, top_k), x, weights)):
        layout = plan.layout(plan.token_axes, "None")
        np.testing.assert_allclose(y, cut(expected, layout, rank), rtol=1e-9, atol=1e-12)
        assert_shares(shares, cut(x, layout, rank), weights, settings_of(num_experts, top_k))


def assert_shares(shares, x, weights: dict, moe: MoESettings):
    """Mean probability of each expert and its shares of all choices, sent and taken."""
    probabilities, experts, _ = route(x, weights["router"], moe.top_k)
    sent = np.bincount(experts.flatten(), minlength=moe.num_experts)
    assert shares.shape == (1, 3, moe.num_experts)
    np.testing.assert_allclose(shares[0, 0], probabilities.mean(0), rtol=1e-9)
    np.testing.assert_allclose(shares[0, 1], sent / experts.size, rtol=1e-9)
    # Which choices were taken is told by the answers; how many follows from the capacity alone.
    limit = (
        capacity(len(x), moe.top_k, moe.num_experts, moe.capacity_factor) if moe.capacity_factor else len(x)
    )
    np.testing.assert_allclose(shares[0, 2], np.minimum(sent, limit) / experts.size, rtol=1e-9)


@pytest.mark.parametrize("tokens", [1, 4])
def test_devices_that_nobody_sends_to_receive_rows_of_zeros_and_answer(tokens):
    """All tokens go to the experts of the last device: the others' all-to-all would have nothing."""
    every = plans((1, 2, 2), "experts")
    weights = random_weights(np.random.default_rng(1), 8, 3)
    x = np.abs(np.random.default_rng(2).standard_normal((4 * tokens, HIDDEN)))
    weights["router"] = np.repeat([[-1.0], [-0.9], [-0.8], [-0.7], [-0.6], [-0.5], [1.0], [2.0]], HIDDEN, 1)
    assert set(route(x, weights["router"], 2)[1].flatten()) == {6, 7}
    expected = np.split(moe_block(x, weights, 2), 4)
    for (y, _), own in zip(run_block(every, settings_of(8, 2), x, weights), expected, strict=True):
        np.testing.assert_allclose(y, own, rtol=1e-9, atol=1e-12)


# --- parts of the dropless exchange -------------------------------------------------------------------------


def test_rows_for_own_experts_by_hand():
    # Two senders; of three own experts the first sender has rows for the first and the last only.
    counts = np.array([[2, 0, 1], [1, 2, 0]], np.int32)
    with numpy_cells(World(1)):
        found = SentExperts(3).construct(counts, np.zeros((6, HIDDEN)))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [0, 0, 2, 0, 1, 1])


def test_the_gradient_of_a_grouped_product_is_a_loops():
    rng = np.random.default_rng(5)
    rows, weight = rng.standard_normal((7, 4)), rng.standard_normal((4, 3, 4))
    upstream = rng.standard_normal((7, 3))
    ends = np.array([2, 2, 6, 7])  # the second expert has no rows
    with numpy_cells(World(1)):
        cell = GroupedMatMulTransposed()
        y = cell.construct(rows, weight, ends)
        drows, dweight, _ = cell.bprop(rows, weight, ends, y, upstream)
    expert = [0, 0, 2, 2, 2, 2, 3]
    np.testing.assert_allclose(y, [weight[e] @ row for e, row in zip(expert, rows, strict=True)])
    np.testing.assert_allclose(drows, [weight[e].T @ dy for e, dy in zip(expert, upstream, strict=True)])
    expected = np.zeros_like(weight)
    for e, row, dy in zip(expert, rows, upstream, strict=True):
        expected[e] += np.outer(dy, row)
    np.testing.assert_allclose(dweight, expected, atol=1e-12)


def test_experts_with_turned_weights_answer_as_those_that_were_trained():
    rng = np.random.default_rng(6)
    weights, x = random_weights(rng, 5, 4), rng.standard_normal((9, HIDDEN))
    _, experts, gates = route(x, weights["router"], 2)
    turned = [weights[name].swapaxes(1, 2) for name in ("w1", "w3", "w2")]
    with numpy_cells(World(1)):
        cell = DroplessExpertsFused(settings_of(5, 2), swiglu, transposed=True)
        y = cell.construct(x, experts.astype(np.int32), gates, *turned, weights["b2"][None, :, None])
    np.testing.assert_allclose(y, moe_block(x, weights, 2), rtol=1e-9, atol=1e-12)
