"""TelechatMoE: routing, auxiliary loss, loads and every gradient against loops; random biases everywhere."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn, ops
from oracle_moe import RULES, balance_loss, capacity, kept_assignments, moe_block, route
from torch_experts import to_torch, weighted_experts

from research.telechat2.model.kernels.select import ReferenceKernels
from research.telechat2.model.moe import TelechatMoE
from research.telechat2.telechat_config import TelechatConfig

HIDDEN, WIDTH, NUM_EXPERTS, TOP_K, TOKENS, ALPHA = 16, 12, 5, 2, 30, 0.01
FACTOR = 0.6  # of an even share: ceil(0.6 * 2 * 30 / 5 = 7.2) = 8 of 12 choices
AMPLE = NUM_EXPERTS / TOP_K  # a place for every token on every expert
# Under the names of ``moe_block``, the parameters and what brings them to its shapes.
NAMES = {"router": "router.dense.weight", "w1": "ffn.w1.weight", "w3": "ffn.w3.weight", "w2": "ffn.w2.weight",
         "b2": "ffn.w2.bias"}  # fmt: skip


def config(
    capacity_factor: float, rule: str = "k-major", alpha: float = ALPHA, top_k: int = TOP_K,
    num_experts: int = NUM_EXPERTS, **more,
) -> TelechatConfig:  # fmt: skip
    moe_config = {
        "expert_num": num_experts, "num_experts_chosen": top_k, "capacity_factor": capacity_factor,
        "enable_sdrop": rule == "token-major", "aux_loss_types": ["expert"], "aux_loss_factors": [alpha],
    }  # fmt: skip
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_heads": 1, "compute_dtype": "float32"}
    return TelechatConfig(**sizes | more, moe_config=moe_config)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Random parameters by the names of ``NAMES``; the router's spread some experts far apart."""
    rng = np.random.default_rng(3)
    shapes = {
        "router": (NUM_EXPERTS, HIDDEN), "w1": (NUM_EXPERTS, WIDTH, HIDDEN),
        "w3": (NUM_EXPERTS, WIDTH, HIDDEN), "w2": (NUM_EXPERTS, HIDDEN, WIDTH),
        "b2": (1, NUM_EXPERTS, 1, HIDDEN),
    }  # fmt: skip
    return {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in shapes.items()
    }


def tokens(seed: int) -> np.ndarray:
    """With a mean, so that experts are not asked for equally often."""
    return (np.random.default_rng(seed).standard_normal((TOKENS, HIDDEN)) + 0.4).astype(np.float32)


def block_of(settings: TelechatConfig, arrays: dict) -> TelechatMoE:
    cell = TelechatMoE(settings, ReferenceKernels())
    parameters = {parameter.name: parameter for parameter in cell.trainable_params()}
    assert parameters.keys() == set(NAMES.values())
    for name, array in arrays.items():
        parameters[NAMES[name]].set_data(Tensor(array))
    return cell.set_train(True)


def loop_weights(arrays: dict) -> dict:
    return arrays | {"b2": arrays["b2"][0, :, 0]}


def close(found, expected, tolerance: float):
    """Equal up to ``tolerance`` relative to the norm."""
    found = found.asnumpy() if isinstance(found, Tensor) else found
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def assert_loads(cell: TelechatMoE, experts, kept=None):
    """``expert_load``: each expert's share of all choices as they were made, and as they were kept."""
    kept = np.ones(experts.shape, bool) if kept is None else kept
    counts = [np.bincount(chosen.flatten(), minlength=NUM_EXPERTS) for chosen in (experts, experts[kept])]
    np.testing.assert_allclose(cell.expert_load.asnumpy(), np.stack(counts) / experts.size, rtol=1e-6)


# --- routing ------------------------------------------------------------------------------------------------


def ties(top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers for tokens and router: logits are exact, and mostly equal to others of their token."""
    rng = np.random.default_rng(2)
    x, router = rng.integers(-1, 2, (60, HIDDEN)), rng.integers(-1, 2, (NUM_EXPERTS, HIDDEN))
    x[:, 4:], x[0] = 0, 0
    logits = x @ router.T
    edge = -np.sort(-logits, axis=1)
    assert np.mean(edge[:, top_k - 1] == edge[:, min(top_k, NUM_EXPERTS - 1)]) > 0.2
    return x.astype(np.float32), router.astype(np.float32)


@pytest.mark.parametrize("top_k", [1, 2, 3, NUM_EXPERTS])
def test_ties_go_to_the_lower_numbers(arrays, top_k):
    x, router = ties(top_k)
    cell = block_of(config(0.0, top_k=top_k), arrays | {"router": router})
    y = cell(Tensor(x))[0]
    _, experts, _ = route(x, router, top_k)
    assert experts[0].tolist() == list(range(top_k))  # of the token that is zero, to which all are alike
    close(y, moe_block(x, loop_weights(arrays | {"router": router}), top_k), 2e-6)
    assert_loads(cell, experts)


@pytest.mark.parametrize("factor", [0.0, FACTOR])
def test_a_token_that_is_no_number_leaves_the_others_alone(arrays, factor):
    """A step may overflow, which the loss scaler then skips: no index may leave its range before."""
    x = tokens(1)
    cell = block_of(config(factor), arrays)
    x[-1] = np.nan  # the last one in k-major order of first choices; second choices come after it
    y, loss = (out.asnumpy() for out in cell(Tensor(x)))
    assert np.isnan(y[-1]).all() and np.isnan(loss).all()
    if factor == 0.0:
        close(y[:-1], moe_block(x[:-1], loop_weights(arrays), TOP_K), 2e-6)
    assert np.isfinite(y[:-1]).all()


def test_gates_add_up_to_one(arrays):
    """Experts that all answer with the same bias and nothing else: that is the block's answer."""
    answer = np.tile(arrays["b2"][:, :1], (1, NUM_EXPERTS, 1, 1))
    cell = block_of(config(0.0), arrays | {"w2": 0 * arrays["w2"], "b2": answer})
    x = tokens(2)
    np.testing.assert_allclose(cell(Tensor(x))[0].asnumpy(), np.tile(answer[0, 0], (TOKENS, 1)), rtol=1e-6)


def test_gates_are_divided_by_their_sum_and_a_billionth(arrays):
    """One expert per token and many of them: without the billionth the gate would be 1 exactly."""
    answer = np.ones_like(arrays["b2"])
    cell = block_of(config(0.0, top_k=1), arrays | {"w2": 0 * arrays["w2"], "b2": answer})
    x = np.zeros((1, HIDDEN), np.float32)
    y = cell(Tensor(x))[0].asnumpy()
    np.testing.assert_allclose(y, 0.2 / (0.2 + 1e-9), rtol=1e-7)


# --- the block ----------------------------------------------------------------------------------------------


class Step(nn.Cell):
    """Output, auxiliary loss, and the gradients of ``sum(y * upstream) + weight * loss``."""

    def __init__(self, block: TelechatMoE):
        super().__init__()
        self.block = block
        parameters = ms.ParameterTuple(block.trainable_params())
        self.names = [parameter.name.removeprefix("block.") for parameter in parameters]
        self.step = ops.value_and_grad(self.total, 0, parameters, has_aux=True)

    def total(self, x, upstream, weight):
        y, loss = self.block(x)
        return (y * upstream).sum() + (loss * weight).sum(), y, loss

    def construct(self, x, upstream, weight):
        return self.step(x, upstream, weight)

    def run(self, x, upstream, weight: float = 1.0):
        (_, y, loss), (dx, grads) = self(Tensor(x), Tensor(upstream), Tensor(weight, ms.float32))
        grads = {name: grad.asnumpy() for name, grad in zip(self.names, grads, strict=True)}
        return y.asnumpy(), loss.asnumpy(), {"x": dx.asnumpy()} | grads


def torch_step(x, arrays: dict, kept, upstream, weight: float, alpha: float = ALPHA):
    """The same in torch, float64: what is kept is given, who is chosen is not."""
    leaves = {name: to_torch(array) for name, array in arrays.items()}
    x = to_torch(x)
    probabilities = torch.softmax(x @ leaves["router"].T, -1)
    experts = torch.argsort(probabilities, dim=-1, descending=True, stable=True)[:, :TOP_K]
    picked = torch.take_along_dim(probabilities, experts, -1)
    gates = picked / (picked.sum(-1, keepdim=True) + 1e-9)
    shares = torch.bincount(experts.flatten(), minlength=NUM_EXPERTS) / experts.numel()
    loss = alpha * NUM_EXPERTS * (shares * probabilities.mean(0)).sum()
    y = weighted_experts(
        x, experts, gates * torch.tensor(kept), *(leaves[name] for name in ("w1", "w3", "w2", "b2"))
    )
    ((y * torch.tensor(upstream)).sum() + weight * loss).backward()
    grads = {NAMES[name]: leaf.grad.numpy() for name, leaf in leaves.items()}
    return y.detach().numpy(), loss.item(), {"x": x.grad.numpy()} | grads


def keeps(x, arrays: dict, rule: str | None) -> np.ndarray:
    _, experts, _ = route(x, arrays["router"], TOP_K)
    if rule is None:
        return np.ones(experts.shape, bool)
    return kept_assignments(experts, NUM_EXPERTS, capacity(len(x), TOP_K, NUM_EXPERTS, FACTOR), rule)


@pytest.fixture(scope="module", params=[None, *RULES], ids=str)
def step(request, arrays):
    """A block in training: dropless, or dropping by a rule."""
    factor = 0.0 if request.param is None else FACTOR
    return Step(block_of(config(factor, request.param or "k-major"), arrays)), request.param


@pytest.mark.parametrize("weight", [0.0, 1000.0], ids=["of-the-output", "of-the-auxiliary-loss"])
def test_outputs_and_every_gradient_equal_those_of_loops(step, arrays, weight):
    """The auxiliary loss is small: beside the output it hides, so it has a turn with its thousandfold."""
    cell, rule = step
    x = tokens(4)
    upstream = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    kept = keeps(x, arrays, rule)
    assert (rule is None) == kept.all()
    y, loss, grads = cell.run(x, upstream if weight == 0 else 0 * upstream, weight)
    expected = torch_step(x, arrays, kept, upstream if weight == 0 else 0 * upstream, weight)
    close(y, expected[0], 2e-6)
    np.testing.assert_allclose(loss, [expected[1]], rtol=2e-6)
    assert grads.keys() == expected[2].keys()
    for name, grad in expected[2].items():
        close(grads[name], grad, 1e-5)
    if weight:  # it reaches the router and the tokens alone
        assert {name for name, grad in grads.items() if grad.any()} == {"x", NAMES["router"]}


def test_loss_and_loads_are_counts(step, arrays):
    """The first row of ``expert_load`` is what tokens asked for, the second what experts took."""
    cell, rule = step
    x = tokens(6)
    y, loss, _ = cell.run(x, np.ones_like(x))
    kept, (probabilities, experts, _) = keeps(x, arrays, rule), route(x, arrays["router"], TOP_K)
    close(y, moe_block(x, loop_weights(arrays), TOP_K, FACTOR if rule else None, rule or "k-major"), 2e-6)
    np.testing.assert_allclose(loss, [balance_loss(probabilities, experts, ALPHA)], rtol=2e-6)
    assert kept.all() == (rule is None)
    assert_loads(cell.block, experts, kept)


def test_ample_capacity_equals_dropless(arrays):
    x = tokens(7)
    upstream = np.random.default_rng(8).standard_normal(x.shape).astype(np.float32)
    ample, dropless = (Step(block_of(config(factor), arrays)).run(x, upstream) for factor in (AMPLE, 0.0))
    close(ample[0], dropless[0], 1e-6)
    np.testing.assert_array_equal(ample[1], dropless[1])
    for name, grad in dropless[2].items():
        close(ample[2][name], grad, 1e-6)


def test_evaluation_drops_nothing_and_leaves_the_loads(arrays):
    cell, x = block_of(config(0.1), arrays), tokens(9)
    expected = moe_block(x, loop_weights(arrays), TOP_K)
    dropping = cell(Tensor(x))[0].asnumpy()
    assert np.abs(dropping - expected).max() > 0.1
    loads = cell.expert_load.asnumpy()
    assert loads.any()
    cell.set_train(False)
    y, loss = cell(Tensor(2 * x))
    close(y, moe_block(2 * x, loop_weights(arrays), TOP_K), 2e-6)
    np.testing.assert_array_equal(cell.expert_load.asnumpy(), loads)
    probabilities, experts, _ = route(2 * x, arrays["router"], TOP_K)
    np.testing.assert_allclose(loss.asnumpy(), [balance_loss(probabilities, experts, ALPHA)], rtol=2e-6)


def test_a_choice_of_all_experts_is_their_mean_by_probability(arrays):
    """k = E: the gates are the probabilities themselves."""
    cell, x = block_of(config(0.0, top_k=NUM_EXPERTS), arrays), tokens(10)
    close(cell(Tensor(x))[0], moe_block(x, loop_weights(arrays), NUM_EXPERTS), 2e-6)
    np.testing.assert_allclose(cell.expert_load.asnumpy(), 1 / NUM_EXPERTS, rtol=1e-6)


def test_the_router_stays_in_float32_where_the_block_computes_in_float16(arrays):
    """Tokens go where float32 sends them, though float16 would send some elsewhere."""
    x = tokens(11)
    rows = arrays["router"] * np.float32(1e-3) + arrays["router"][:1]  # differences that float16 rounds away
    half = (x.astype(np.float16) @ rows.astype(np.float16).T).astype(np.float32)
    cell = block_of(config(0.0, compute_dtype="float16"), arrays | {"router": rows})
    _, experts, _ = route(x, rows, TOP_K)
    assert (np.argsort(-half, 1, kind="stable")[:, :TOP_K] != experts).any()
    y, loss = cell(Tensor(x))
    assert y.dtype == ms.float16 and loss.dtype == ms.float32
    assert_loads(cell, experts)
    close(y.asnumpy().astype(np.float32), moe_block(x, loop_weights(arrays) | {"router": rows}, TOP_K), 2e-3)


# Loss by hand: tokens of one channel to 3 experts, whose probabilities are 1/6, 2/6, 3/6 or 2/6, 2/6, 2/6.
def test_auxiliary_loss_by_hand():
    """Top 1: the first two tokens go to expert 2, the others to expert 0, the lower of equals.

    Shares 1/2, 0, 1/2; mean probabilities 1/4, 1/3, 5/12: 0.1 * 3 * (1/2 * 1/4 + 1/2 * 5/12) = 0.1.
    """
    settings = config(FACTOR, alpha=0.1, top_k=1, num_experts=3)
    cell = TelechatMoE(settings, ReferenceKernels()).set_train(True)
    router = np.zeros((3, HIDDEN), np.float32)
    router[:, 0] = np.log([1, 2, 3])
    cell.router.dense.weight.set_data(Tensor(router))
    x = np.zeros((4, HIDDEN), np.float32)
    x[:2, 0] = 1
    loss = cell(Tensor(x))[1]
    assert loss.shape == (1,)
    np.testing.assert_allclose(loss.asnumpy(), [0.1], rtol=1e-6)
    # capacity ceil(0.6 * 4 / 3 = 0.8) = 1: one of the two tokens that each expert is sent
    np.testing.assert_allclose(cell.expert_load.asnumpy(), [[1 / 2, 0, 1 / 2], [1 / 4, 0, 1 / 4]], rtol=1e-6)


def test_without_a_factor_there_is_no_loss(arrays):
    cell = block_of(config(0.0, alpha=0.0), arrays)
    assert cell(Tensor(tokens(12)))[1].asnumpy().tolist() == [0.0]
