"""The mixture of experts, block and model, against the oracles; weights go through the converter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mindspore import Tensor
from model_fixtures import (
    FP32,
    RandomModel,
    assert_same_gradients,
    generate,
    int32,
    loss_and_gradients,
    oracle_generate,
    prompts,
)
from oracle_moe import (
    RULES,
    balance_loss,
    capacity,
    drop_beyond_capacity,
    ernie_loss_and_gradients,
    kept_assignments,
    load_ernie,
    moe_block,
    route,
)

from research.telechat2.model.kernels.select import ReferenceKernels
from research.telechat2.model.moe import TelechatMoE
from research.telechat2.telechat_config import TelechatConfig

SEQ_LENGTH, BATCH, VOCAB, ALPHA = 32, 2, 256, 0.01
# heads, key/value heads, experts, experts of each token, tied
CASES = {
    "mha-16-of-which-4": (2, None, 16, 4, False),
    "gqa-16-of-which-4-tied": (4, 2, 16, 4, True),
    "gqa-5-of-which-2": (4, 2, 5, 2, False),
}
DROPLESS = {"capacity_factor": 0.0, "aux_loss_types": ["expert"], "aux_loss_factors": [ALPHA]}


def random_model(folder, case: str, seed: int = 0) -> RandomModel:
    heads, kv_heads, num_experts, top_k, tied = CASES[case]
    kv = {} if kv_heads is None else {"num_key_value_heads": kv_heads}
    return RandomModel(
        folder, seed=seed, tied=tied, hidden_size=heads * 64, n_head=heads, n_layer=2, **kv,
        ffn_hidden_size=80, vocab_size=VOCAB, num_experts=num_experts, num_experts_per_tok=top_k,
    )  # fmt: skip


def records(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids ``[BATCH, SEQ_LENGTH + 1]``, and labels of which a part that differs by row is ignored."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, VOCAB, (BATCH, SEQ_LENGTH + 1))
    ignored = rng.random(ids.shape) < [[0.2], [0.6]]
    return ids, np.where(ignored, -100, ids)


def by_expert(grads: dict) -> dict:
    """Gradients with those of stacked experts taken apart: none hides behind the others' size."""
    parts = {}
    for name, grad in grads.items():
        if ".ffn." not in name:
            parts[name] = grad
            continue
        experts = grad[0] if grad.ndim == 4 else grad
        parts |= {f"{name}[{e}]": part for e, part in enumerate(experts)}
        assert len(experts) in (5, 16)
    return parts


def assert_same_step(found, expected) -> None:
    """Loss and gradients of a training step."""
    np.testing.assert_allclose(found[0], [expected[0]], rtol=1e-5)
    assert {name: grad.shape for name, grad in found[1].items()} == {
        name: grad.shape for name, grad in expected[1].items()
    }
    assert_same_gradients(by_expert(found[1]), by_expert(expected[1]))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """One model as ours and as the oracle, with what both make of the same records."""
    random = random_model(tmp_path_factory.mktemp("moe"), request.param)
    ids, labels = records(seed=1)
    model = random.build(seq_length=SEQ_LENGTH, moe_config=DROPLESS)
    return SimpleNamespace(
        random=random, ids=ids, logits=model(int32(ids))[0].asnumpy(),
        found=loss_and_gradients(model)(ids, labels),
        expected=ernie_loss_and_gradients(random.oracle, random.sizes, ids, labels, ALPHA),
    )  # fmt: skip


def test_logits_equal_ernies(pair):
    with torch.no_grad():
        expected = pair.random.oracle(torch.tensor(pair.ids)).logits.numpy()
    assert 0.9 < expected.std() < 1.1  # the tolerance is meant for logits of about this size
    assert pair.logits.dtype == np.float32
    np.testing.assert_allclose(pair.logits, expected, rtol=0, atol=2e-5)


def test_loss_and_every_gradient_equal_ernies(pair):
    assert_same_step(pair.found, pair.expected)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("small"), "gqa-5-of-which-2", seed=2)


@pytest.mark.parametrize("rule", RULES)
def test_training_with_drops_equals_the_oracles(small, rule):
    """At 0.8 of an even share, experts must drop: whom, the rule says."""
    ids, labels = records(seed=3)
    moe_config = DROPLESS | {"capacity_factor": 0.8, "enable_sdrop": rule == "token-major"}
    found = loss_and_gradients(small.build(seq_length=SEQ_LENGTH, moe_config=moe_config))(ids, labels)
    losses = {"dropless": ernie_loss_and_gradients(small.oracle, small.sizes, ids, labels, ALPHA)[0]}
    for each in RULES:
        dropping = load_ernie(small.hf)
        drop_beyond_capacity(dropping, 0.8, each)
        expected = ernie_loss_and_gradients(dropping, small.sizes, ids, labels, ALPHA)
        losses[each] = expected[0]
        if each == rule:
            assert_same_step(found, expected)
    assert np.diff(sorted(losses.values())).min() > 1e-3 * losses[rule]  # the three can be told apart


def test_evaluation_drops_nothing(small):
    """Whatever the capacity in training."""
    ids, labels = records(seed=4)
    model = small.build(seq_length=SEQ_LENGTH, moe_config=DROPLESS | {"capacity_factor": 0.2})
    with torch.no_grad():
        expected = small.oracle(torch.tensor(ids)).logits
        targets = torch.tensor(labels[:, 1:]).reshape(-1)
        loss = torch.nn.functional.cross_entropy(
            expected[:, :-1].reshape(len(targets), -1), targets, reduction="sum"
        )
    np.testing.assert_allclose(model(int32(ids))[0].asnumpy(), expected.numpy(), rtol=0, atol=2e-5)
    total, count = (part.item() for part in model(int32(ids), int32(labels)))
    np.testing.assert_allclose(total, loss.item(), rtol=1e-5)
    assert count == np.count_nonzero(labels[:, 1:] != -100)


def test_ample_capacity_equals_dropless(small):
    ids, labels = records(seed=5)
    ample = DROPLESS | {"capacity_factor": 2.5}  # 5 experts, 2 of which are chosen: a place for every token
    found = loss_and_gradients(small.build(seq_length=SEQ_LENGTH, moe_config=ample))(ids, labels)
    dropless = loss_and_gradients(small.build(seq_length=SEQ_LENGTH, moe_config=DROPLESS))(ids, labels)
    np.testing.assert_allclose(found[0], dropless[0], rtol=1e-6)
    for name, grad in dropless[1].items():
        assert np.linalg.norm(found[1][name] - grad) <= 1e-6 * np.linalg.norm(grad), name


MODES = {
    "paged": {"use_past": True, "block_size": 4, "num_blocks": 40},
    "no-cache": {"use_past": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_answers_equal_ernies(small, mode):
    """Unequal prompts in one batch, one of them a single token; no token is dropped at any step."""
    model = small.build(seq_length=SEQ_LENGTH, moe_config=DROPLESS | {"capacity_factor": 0.2}, **MODES[mode])
    rows = prompts(7, VOCAB, 7, 1, 18)
    expected = [oracle_generate(small, row, 12) for row in rows]
    assert generate(model, rows, max_new_tokens=12) == expected


# --- one block against the NumPy loops ----------------------------------------------------------------------

HIDDEN, WIDTH, NUM_EXPERTS, TOP_K, TOKENS = 64, 48, 5, 2, 40
HALF = 0.5  # a capacity of half an even share


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    shapes = {"router": (HIDDEN,), "b2": (HIDDEN,), "w2": (HIDDEN, WIDTH)}
    shapes |= dict.fromkeys(("w1", "w3"), (WIDTH, HIDDEN))
    arrays = {
        name: rng.standard_normal((NUM_EXPERTS, *shape), dtype=np.float32) for name, shape in shapes.items()
    }
    return {name: array / np.float32(np.sqrt(array.shape[-1])) for name, array in arrays.items()}


# Router weights made of random ones.
ROUTERS = {
    "random": lambda rows: rows,
    "all-tied": lambda rows: rows * 0,  # every token to experts 0 and 1, the lower ones among equals
    "some-tied": lambda rows: rows * np.float32([[0], [0], [1], [0], [0]]),  # expert 2 is first or last
}


@pytest.fixture(scope="module", params=["evaluation", "dropless", *RULES])
def block(request):
    """Our block as it is evaluated, trained dropless, or trained at half an even share under a rule."""
    rule = request.param if request.param in RULES else None
    factor = HALF if rule or request.param == "evaluation" else 0.0
    config = TelechatConfig(
        hidden_size=HIDDEN, num_heads=1, intermediate_size=WIDTH, num_layers=1, vocab_size=8, **FP32,
        moe_config=DROPLESS | {
            "expert_num": NUM_EXPERTS, "num_experts_chosen": TOP_K, "routing_policy": "TopkRouterV2",
            "capacity_factor": factor, "enable_sdrop": rule == "token-major",
        },
    )  # fmt: skip
    return TelechatMoE(config, ReferenceKernels()).set_train(request.param != "evaluation"), rule


@pytest.mark.parametrize("num_tokens", [TOKENS, 1])
@pytest.mark.parametrize("router", ROUTERS)
def test_block_equals_the_loops(block, weights, router, num_tokens):
    """Output, auxiliary loss, and the statistics that training leaves; T = 1 has a place for each choice."""
    cell, rule = block
    weights = weights | {"router": ROUTERS[router](weights["router"])}
    for name in ("w1", "w3", "w2"):
        getattr(cell.ffn, name).weight.set_data(Tensor(weights[name]))
    cell.ffn.w2.bias.set_data(Tensor(weights["b2"][None, :, None]))
    cell.router.dense.weight.set_data(Tensor(weights["router"]))
    x = np.random.default_rng(9).standard_normal((num_tokens, HIDDEN), dtype=np.float32)
    y, loss = (out.asnumpy() for out in cell(Tensor(x)))

    probabilities, experts, _ = route(x, weights["router"], TOP_K)
    expected = moe_block(x, weights, TOP_K, HALF if rule else None, rule or "k-major")
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, [balance_loss(probabilities, experts, ALPHA)], rtol=1e-6)
    if cell.training:
        kept = np.ones_like(experts, bool)
        if rule:
            kept = kept_assignments(
                experts, NUM_EXPERTS, capacity(num_tokens, TOP_K, NUM_EXPERTS, HALF), rule
            )
        load = [np.bincount(chosen, minlength=NUM_EXPERTS) for chosen in (experts.flatten(), experts[kept])]
        np.testing.assert_allclose(cell.expert_load.asnumpy(), np.divide(load, experts.size), rtol=1e-6)
