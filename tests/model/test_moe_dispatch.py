"""Tokens to their experts and back: every row and gradient of the dispatch against plain loops."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn, ops
from oracle_moe import RULES, kept_assignments
from torch_experts import to_torch, weighted_experts

from research.telechat2.config.moe import MoESettings
from research.telechat2.model.kernels.ascend import TopKFused
from research.telechat2.model.kernels.moe_dispatch import (
    CapacityExperts,
    DroplessExpertsReference,
    ExpertRows,
    GatedBias,
    Permute,
    TopKReference,
    Unpermute,
)
from research.telechat2.model.kernels.reference import SwiGLUReference

HIDDEN, WIDTH = 12, 10


def int32(values) -> Tensor:
    return Tensor(np.asarray(values, np.int32))


class Rows(nn.Cell):
    """ExpertRows with its capacity fixed, as a graph of its own."""

    def __init__(self, num_experts: int, rule: str, capacity: int | None):
        super().__init__()
        self.expert_rows = ExpertRows(num_experts, rule == "token-major")
        self.capacity = capacity

    def construct(self, experts):
        return self.expert_rows(experts, self.capacity)


def find_rows(experts, num_experts: int, rule: str, capacity: int | None) -> list[np.ndarray]:
    return [out.asnumpy() for out in Rows(num_experts, rule, capacity)(int32(experts))]


def loop_rows(experts, num_experts: int, rule: str, capacity: int | None):
    """What ExpertRows is to find, choice by choice."""
    experts = np.asarray(experts)
    num_tokens, top_k = experts.shape
    kept = kept_assignments(experts, num_experts, num_tokens if capacity is None else capacity, rule)
    if capacity is None:
        capacity = np.bincount(experts.flatten(), minlength=num_experts).max()
    rows = np.full(experts.shape, num_experts * capacity - 1)
    choices = np.full(num_experts * capacity, -1)
    order = [(t, j) for t in range(num_tokens) for j in range(top_k)]
    if rule == "k-major":
        order.sort(key=lambda choice: choice[1])
    free = np.arange(num_experts) * capacity
    for t, j in order:
        if kept[t, j]:
            rows[t, j], choices[free[experts[t, j]]] = free[experts[t, j]], t * top_k + j
            free[experts[t, j]] += 1
    return rows, kept, choices


# --- rows by hand -------------------------------------------------------------------------------------------

# token:     0       1       2       3
BY_HAND = [[0, 1], [0, 2], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("rule", "capacity", "rows", "kept", "choices"),
    [
        (  # expert 0 is first choice of tokens 0, 1, 3, then second of 2; expert 1 first of 2, second of 0, 3
            "k-major", 2,
            [[0, 3], [1, 4], [2, 5], [5, 5]],
            [[1, 1], [1, 1], [1, 0], [0, 0]],
            [0, 2, 4, 1, 3, -1],
        ),
        (  # expert 0 is asked for by tokens 0, 1, 2, 3 in this order, expert 1 by 0, 2, 3
            "token-major", 2,
            [[0, 2], [1, 4], [3, 5], [5, 5]],
            [[1, 1], [1, 1], [1, 0], [0, 0]],
            [0, 2, 1, 4, 3, -1],
        ),
        ("k-major", 3, [[0, 4], [1, 6], [3, 8], [2, 5]], [[1, 1], [1, 1], [1, 0], [1, 1]],
         [0, 2, 6, 4, 1, 7, 3, -1, -1]),
        ("token-major", 3, [[0, 3], [1, 6], [4, 2], [8, 5]], [[1, 1], [1, 1], [1, 1], [0, 1]],
         [0, 2, 5, 1, 4, 7, 3, -1, -1]),
        ("k-major", 1, [[0, 2], [2, 2], [1, 2], [2, 2]], [[1, 0], [0, 1], [1, 0], [0, 0]], [0, 4, 3]),
        ("token-major", 1, [[0, 1], [2, 2], [2, 2], [2, 2]], [[1, 1], [0, 1], [0, 0], [0, 0]], [0, 1, 3]),
        # the busiest expert, 0, is asked for four times: four rows for each
        ("k-major", None, [[0, 5], [1, 8], [4, 3], [2, 6]], [[1, 1]] * 4,
         [0, 2, 6, 5, 4, 1, 7, -1, 3, -1, -1, -1]),
        ("token-major", None, [[0, 4], [1, 8], [5, 2], [3, 6]], [[1, 1]] * 4,
         [0, 2, 5, 6, 1, 4, 7, -1, 3, -1, -1, -1]),
    ],
)  # fmt: skip
def test_rows_by_hand(rule, capacity, rows, kept, choices):
    for found, expected in zip(find_rows(BY_HAND, 3, rule, capacity), (rows, kept, choices), strict=True):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


# Experts of each token, by what is odd about them; of 4 experts.
CORNERS = {
    "one-token": [[2, 0]],
    "all-to-one": [[3]] * 7,
    "all-to-the-first": [[0, 1]] * 6,
    "every-expert": [[3, 1, 0, 2], [0, 1, 2, 3], [2, 3, 1, 0]],
    "some-without-tokens": [[1, 3], [3, 1], [1, 3]],
}


@pytest.fixture
def operator_by_operator():
    """Without a compilation for each example."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.mark.parametrize("capacity", [None, 1, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("corner", CORNERS)
def test_rows_at_the_corners(operator_by_operator, corner, rule, capacity):
    experts = CORNERS[corner]
    for found, expected in zip(
        find_rows(experts, 4, rule, capacity), loop_rows(experts, 4, rule, capacity), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rule=st.sampled_from(RULES))
def test_every_kept_choice_has_a_row_of_its_own_among_its_experts(operator_by_operator, data, rule):
    num_experts = data.draw(st.integers(1, 6), label="E")
    top_k, num_tokens = data.draw(st.integers(1, num_experts), label="k"), data.draw(st.integers(1, 14))
    capacity = data.draw(st.none() | st.integers(1, num_tokens), label="capacity")
    experts = np.array([data.draw(st.permutations(range(num_experts)))[:top_k] for _ in range(num_tokens)])
    rows, kept, choices = find_rows(experts, num_experts, rule, capacity)
    limit = num_tokens if capacity is None else capacity
    np.testing.assert_array_equal(kept, kept_assignments(experts, num_experts, limit, rule))
    size = len(choices) // num_experts
    busiest = np.bincount(experts.flatten()).max()
    assert size == (busiest if capacity is None else capacity)
    where = np.argwhere(kept)
    for t, j in where:
        assert rows[t, j] // size == experts[t, j]
        assert choices[rows[t, j]] == t * top_k + j  # so no other choice has this row
    assert np.count_nonzero(choices >= 0) == len(where) and np.all(choices >= -1)
    assert np.all(rows[kept == 0] == num_experts * size - 1)
    for expert in range(num_experts):  # first come, first row: no empty one before a full one
        held = choices.reshape(num_experts, size)[expert]
        held = held[: np.count_nonzero(held >= 0)]
        counted = [
            (c // top_k, c % top_k) if rule == "token-major" else (c % top_k, c // top_k) for c in held
        ]
        assert np.all(held >= 0) and counted == sorted(counted)


# --- block and back, with gradients -------------------------------------------------------------------------


class WithGradients(nn.Cell):
    """A cell's output, and the gradients of its inputs for a given gradient of the output."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs):
        return self.cell(*inputs[:-1]), self.gradients(self.cell)(*inputs)


def normal(seed: int, *shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def random_experts(seed: int, num_tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)])


def assert_close(found, expected, tolerance: float):
    """Equal up to ``tolerance`` relative to the norm."""
    found = found.asnumpy()
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# A dropped choice points at the last row: here one that a kept choice holds, and one that is empty.
DROPPING = {
    "last-row-held": (random_experts(1, 9, 3, 2), 3, 4),
    "last-row-empty": (np.array([[0, 1], [0, 1], [0, 1], [1, 0]]), 3, 2),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", DROPPING)
def test_tokens_to_rows_and_their_gradients(case, rule):
    experts, num_experts, capacity = DROPPING[case]
    rows, kept, choices = loop_rows(experts, num_experts, rule, capacity)
    assert not kept.all() and (choices[-1] >= 0) == (case == "last-row-held")
    x, upstream = normal(2, (len(experts), HIDDEN), (len(choices), HIDDEN))
    inputs = Tensor(x), int32(rows), int32(kept), int32(choices)
    found, gradients = WithGradients(Permute())(*inputs, Tensor(upstream))
    found = found.asnumpy()
    gradient = np.zeros_like(x)
    for row, choice in enumerate(choices):
        np.testing.assert_array_equal(found[row], x[choice // 2] if choice >= 0 else np.zeros(HIDDEN))
        if choice >= 0:
            gradient[choice // 2] += upstream[row]
    assert_close(gradients[0], gradient, 1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", DROPPING)
def test_rows_to_tokens_and_their_gradients(case, rule):
    experts, num_experts, capacity = DROPPING[case]
    rows, kept, choices = loop_rows(experts, num_experts, rule, capacity)
    block, gates, upstream = normal(3, (len(choices), HIDDEN), experts.shape, (len(experts), HIDDEN))
    y, dblock, dgates = np.zeros_like(upstream), np.zeros_like(block), np.zeros_like(gates)
    for t, j in np.argwhere(kept):
        y[t] += gates[t, j] * block[rows[t, j]]
        dblock[rows[t, j]] = gates[t, j] * upstream[t]
        dgates[t, j] = block[rows[t, j]] @ upstream[t]
    inputs = Tensor(block), Tensor(gates), int32(rows), int32(kept), int32(choices)
    found, gradients = WithGradients(Unpermute())(*inputs, Tensor(upstream))
    assert_close(found, y, 1e-6)
    assert_close(gradients[0], dblock, 1e-6)
    assert_close(gradients[1], dgates, 1e-6)


def test_biases_weighted_by_gates_and_their_gradients():
    experts = random_experts(4, 9, 5, 3)
    gates, bias, upstream = normal(5, experts.shape, (1, 5, 1, HIDDEN), (9, HIDDEN))
    kept = np.random.default_rng(6).integers(0, 2, experts.shape)
    y, dgates, dbias = np.zeros_like(upstream), np.zeros_like(gates), np.zeros_like(bias)
    for t, j in np.argwhere(kept):
        y[t] += gates[t, j] * bias[0, experts[t, j], 0]
        dgates[t, j] = bias[0, experts[t, j], 0] @ upstream[t]
        dbias[0, experts[t, j], 0] += gates[t, j] * upstream[t]
    inputs = int32(experts), Tensor(gates), int32(kept), Tensor(bias)
    found, gradients = WithGradients(GatedBias(5))(*inputs, Tensor(upstream))
    assert_close(found, y, 1e-6)
    assert_close(gradients[1], dgates, 1e-6)
    assert_close(gradients[3], dbias, 1e-6)


# --- the experts --------------------------------------------------------------------------------------------


class Answer(nn.Cell):
    """The experts' answer alone."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, *operands):
        return self.cell(*operands)[0]


def moe_settings(num_experts: int, top_k: int, factor: float, rule: str) -> MoESettings:
    return MoESettings(num_experts, top_k, factor, rule == "token-major", 0.0, True)


def operands_of(seed: int, experts: np.ndarray, num_experts: int) -> list[np.ndarray]:
    """x, gates, w1, w3, w2 and bias, all random."""
    x, gates, w1, w3, w2, bias = normal(
        seed, (len(experts), HIDDEN), experts.shape, (num_experts, WIDTH, HIDDEN),
        (num_experts, WIDTH, HIDDEN), (num_experts, HIDDEN, WIDTH), (1, num_experts, 1, HIDDEN),
    )  # fmt: skip
    return [x, gates, w1 / HIDDEN**0.5, w3 / HIDDEN**0.5, w2 / WIDTH**0.5, bias]


def check_experts(cell, experts, num_experts: int, kept):
    """Output, and gradient of every input, of a cell ``(x, experts, gates, w1, w3, w2, bias) -> y``."""
    arrays = operands_of(7, experts, num_experts)
    (upstream,) = normal(8, arrays[0].shape)
    leaves = [to_torch(array) for array in arrays]
    y = weighted_experts(leaves[0], experts, leaves[1] * torch.tensor(kept), *leaves[2:])
    y.backward(torch.tensor(upstream, dtype=torch.float64))
    tensors = [Tensor(array) for array in arrays]
    tensors.insert(1, int32(experts))
    found, gradients = WithGradients(cell)(*tensors, Tensor(upstream))
    assert_close(found, y, 1e-6)
    for gradient, leaf in zip(gradients[:1] + gradients[2:], leaves, strict=True):
        assert_close(gradient, leaf.grad, 2e-6)
        assert np.all(gradient.asnumpy()[leaf.grad.numpy() == 0] == 0)  # what was dropped learns nothing


EXPERTS = {name: (np.array(experts), 4) for name, experts in CORNERS.items()} | {
    "random": (random_experts(9, 40, 5, 2), 5)
}
# ceil(0.6 k T / E): of 0.3, 1.05, 1.8, 1.8, 0.9 and 9.6
CAPACITY = {
    "one-token": 1, "all-to-one": 2, "all-to-the-first": 2, "every-expert": 2, "some-without-tokens": 1,
    "random": 10,
}  # fmt: skip


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_both_choices_of_experts_are_numpys_where_probabilities_differ(top_k):
    rng = np.random.default_rng(top_k)
    probabilities = rng.permuted(np.tile(np.arange(1, 9, dtype=np.float32) / 36, (50, 1)), axis=1)
    expected = np.argsort(-probabilities, axis=1)[:, :top_k]
    for kernel in (TopKReference, TopKFused):
        experts, chosen = kernel(8, top_k)(Tensor(probabilities))
        assert experts.dtype == ms.int32 and chosen.dtype == ms.float32
        np.testing.assert_array_equal(experts.asnumpy(), expected)
        np.testing.assert_array_equal(chosen.asnumpy(), np.eye(8)[expected])


@pytest.mark.parametrize("case", EXPERTS)
def test_dropless_experts_equal_a_loop_in_outputs_and_gradients(case):
    experts, num_experts = EXPERTS[case]
    cell = DroplessExpertsReference(
        moe_settings(num_experts, experts.shape[1], 0.0, "k-major"), SwiGLUReference()
    )
    check_experts(cell, experts, num_experts, np.ones(experts.shape, bool))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_with_a_capacity_equal_a_loop_in_outputs_and_gradients(case, rule):
    experts, num_experts = EXPERTS[case]
    kept = kept_assignments(experts, num_experts, CAPACITY[case], rule)
    assert kept.all() == (case == "one-token")
    cell = CapacityExperts(moe_settings(num_experts, experts.shape[1], 0.6, rule), SwiGLUReference())
    check_experts(Answer(cell), experts, num_experts, kept)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_dropless_graph_serves_any_number_of_tokens(transposed):
    """With the weights of training, and with those that prediction has transposed."""
    cell = DroplessExpertsReference(
        moe_settings(5, 2, 0.0, "k-major"), SwiGLUReference(), transposed=transposed
    )
    weights = operands_of(10, random_experts(0, 1, 5, 2), 5)[2:]
    stored = [w.swapaxes(1, 2).copy() if transposed and w.ndim == 3 else w for w in weights]
    shapes = [(None, HIDDEN), (None, 2), (None, 2)]
    dtypes = [ms.float32, ms.int32, ms.float32]
    dynamic = [Tensor(shape=shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    cell.set_inputs(*dynamic, *map(Tensor, stored))
    for num_tokens in (1, 7, 30, 2):
        experts = random_experts(num_tokens, num_tokens, 5, 2)
        x, gates = operands_of(num_tokens, experts, 5)[:2]
        y = cell(Tensor(x), int32(experts), Tensor(gates), *map(Tensor, stored))
        expected = weighted_experts(to_torch(x), experts, to_torch(gates), *map(to_torch, weights))
        assert_close(y, expected, 1e-6)
