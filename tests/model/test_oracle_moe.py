"""The oracles of the mixture of experts against each other and against cases worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import load_llama, read_hf_folder, stored_tensors, write_hf_folder
from oracle_moe import (
    RULES,
    balance_loss,
    capacity,
    drop_beyond_capacity,
    ernie_loss_and_gradients,
    ernie_state,
    half_split,
    interleaved,
    kept_assignments,
    layer_weights,
    load_ernie,
    moe_block,
    route,
    training_loss,
)

SIZES = {"hidden_size": 64, "n_head": 4, "n_layer": 2, "ffn_hidden_size": 48, "vocab_size": 96}
STEP = 2e-3  # for slopes: large beside the rounding of a loss in fp32; beyond it tokens change their experts
CASES = {"16-of-which-4": (16, 4, {}), "5-of-which-2-gqa-tied": (5, 2, {"num_key_value_heads": 2})}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def folder(request, tmp_path_factory):
    num_experts, top_k, more = request.param
    sizes = SIZES | more | {"num_experts": num_experts, "num_experts_per_tok": top_k}
    path = tmp_path_factory.mktemp("moe")
    write_hf_folder(path, sizes, seed=num_experts, tied=bool(more))
    return path, top_k


def tokens(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, SIZES["hidden_size"]), dtype=np.float32)


# --- Ernie and the loops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 37])
def test_ernies_block_equals_the_loops(folder, count):
    path, top_k = folder
    ernie, x = load_ernie(path), tokens(1, count)
    for layer in (0, 1):
        with torch.no_grad():
            found = ernie.model.layers[layer].mlp(torch.tensor(x)[None])[0][0].numpy()
        expected = moe_block(x, layer_weights(path, layer), top_k)
        assert 0.2 < expected.std() < 2
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_dropping_in_torch_equals_the_loops(folder, rule):
    path, top_k = folder
    ernie, x, weights = load_ernie(path), tokens(2, 40), layer_weights(path, 1)
    drop_beyond_capacity(ernie, 1.0, rule)
    with torch.no_grad():
        found = ernie.model.layers[1].mlp(torch.tensor(x)[None])[0][0].numpy()
    expected = moe_block(x, weights, top_k, 1.0, rule)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    other = moe_block(x, weights, top_k, 1.0, RULES[1 - RULES.index(rule)])
    assert np.abs(expected - moe_block(x, weights, top_k)).max() > 0.01  # something is dropped
    assert np.abs(expected - other).max() > 0.01  # and who is, the rule decides


def test_equal_experts_are_one_dense_block(tmp_path):
    """Gates sum to one: a model whose experts all hold a dense model's block is that dense model."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    write_hf_folder(dense, SIZES | {"num_key_value_heads": 2}, seed=3)
    write_hf_folder(
        moe, SIZES | {"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3}, seed=4
    )
    llama, ernie = load_llama(dense), load_ernie(moe)
    with torch.no_grad():
        for name in ("embed_tokens", "norm"):
            getattr(ernie.model, name).load_state_dict(getattr(llama.model, name).state_dict())
        ernie.lm_head.weight.copy_(llama.lm_head.weight)
        for here, there in zip(ernie.model.layers, llama.model.layers, strict=True):
            for expert in here.mlp.experts:
                expert.load_state_dict(there.mlp.state_dict())
            for name in ("input_layernorm", "post_attention_layernorm"):
                getattr(here, name).load_state_dict(getattr(there, name).state_dict())
            here.self_attn.load_state_dict(there.self_attn.state_dict())
            for name, heads in (("q_proj", 4), ("k_proj", 2)):
                rows = getattr(there.self_attn, name).weight
                getattr(here.self_attn, name).weight.copy_(interleaved(rows, heads))
        ids = torch.tensor(np.random.default_rng(5).integers(0, SIZES["vocab_size"], (2, 50)))
        np.testing.assert_allclose(ernie(ids).logits, llama(ids).logits, rtol=0, atol=2e-5)


def test_the_folder_is_what_ernie_holds(folder):
    """As many numbers, biases that TeleChat2 lacks and the correction bias left out."""
    path, _ = folder
    absent = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias", "lm_head.bias",
              "e_score_correction_bias")  # fmt: skip
    held = dict(load_ernie(path).named_parameters())
    assert all(not held[name].any() for name in held if name.endswith(absent))
    held_count = sum(p.numel() for name, p in held.items() if not name.endswith(absent))
    assert held_count == sum(int(np.prod(shape)) for _, shape, _ in stored_tensors(path).values())


def test_pairs_side_by_side():
    rows = torch.arange(8).reshape(8, 1)  # two heads of four rows
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert half_split(interleaved(rows, 2), 2).flatten().tolist() == list(range(8))


# --- routing and dropping by hand ---------------------------------------------------------------------------


def test_ties_go_to_the_lower_index():
    """Experts 1, 2 and 4 have the same row, 3 a better one."""
    router = np.array([[-1.0], [0.5], [0.5], [2.0], [0.5]])
    _, experts, gates = route([[1.0]], router, 3)
    assert experts.tolist() == [[3, 1, 2]]
    weights = np.exp([2.0, 0.5, 0.5])
    np.testing.assert_allclose(gates[0], weights / weights.sum(), rtol=1e-8)
    _, experts, gates = route([[0.0]], router, 2)
    assert experts.tolist() == [[0, 1]]
    np.testing.assert_allclose(gates[0], [0.5, 0.5], rtol=1e-8)


def test_one_token_by_hand():
    """H = F = 1, two of three experts; probabilities 1/6, 2/6, 3/6, so gates 3/5 and 2/5."""
    weights = {
        "router": np.log([[1.0], [2.0], [3.0]]),
        "w1": np.array([[[5.0]], [[2.0]], [[0.0]]]),
        "w3": np.array([[[5.0]], [[3.0]], [[7.0]]]),
        "w2": np.array([[[5.0]], [[4.0]], [[9.0]]]),
        "b2": np.array([[50.0], [0.5], [-2.0]]),
    }
    second = 4 * (2 / (1 + np.exp(-2)) * 3) + 0.5
    third = -2.0  # silu(0) is 0: only the bias is left
    np.testing.assert_allclose(moe_block([[1.0]], weights, 2), [[0.6 * third + 0.4 * second]], rtol=1e-8)


# token:     0       1       2       3
BY_HAND = [[0, 1], [0, 2], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("rule", "limit", "kept"),
    [
        # expert 0 is first choice of tokens 0, 1, 3, then second of 2; expert 1 first of 2, second of 0, 3
        ("k-major", 1, [[1, 0], [0, 1], [1, 0], [0, 0]]),
        ("k-major", 2, [[1, 1], [1, 1], [1, 0], [0, 0]]),
        ("k-major", 3, [[1, 1], [1, 1], [1, 0], [1, 1]]),
        # expert 0 is asked for by tokens 0, 1, 2, 3 in this order, expert 1 by 0, 2, 3
        ("token-major", 1, [[1, 1], [0, 1], [0, 0], [0, 0]]),
        ("token-major", 2, [[1, 1], [1, 1], [1, 0], [0, 0]]),
        ("token-major", 3, [[1, 1], [1, 1], [1, 1], [0, 1]]),
        ("k-major", 4, [[1, 1]] * 4),
        ("token-major", 4, [[1, 1]] * 4),
    ],
)
def test_who_is_dropped_by_hand(rule, limit, kept):
    np.testing.assert_array_equal(kept_assignments(BY_HAND, 3, limit, rule), np.array(kept, bool))


@pytest.mark.parametrize("rule", RULES)
def test_all_tokens_to_one_expert(rule):
    """The first tokens find a place, whatever the rule: there is one choice."""
    kept = kept_assignments(np.full((5, 1), 2), 4, 3, rule)
    assert kept[:, 0].tolist() == [True, True, True, False, False]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rule=st.sampled_from(RULES))
def test_every_expert_is_filled_before_it_drops(data, rule):
    num_experts = data.draw(st.integers(1, 6))
    top_k, count = data.draw(st.integers(1, num_experts)), data.draw(st.integers(1, 12))
    limit = data.draw(st.integers(1, count))
    experts = np.array([data.draw(st.permutations(range(num_experts)))[:top_k] for _ in range(count)])
    kept = kept_assignments(experts, num_experts, limit, rule)
    wanted = np.bincount(experts.flatten(), minlength=num_experts)
    taken = np.bincount(experts[kept], minlength=num_experts)
    np.testing.assert_array_equal(taken, np.minimum(wanted, limit))


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "factor", "expected"),
    [
        (2048, 4, 16, 1.2, 615),  # 614.4
        (10, 4, 16, 1.2, 3),  # 3 exactly
        (200, 4, 16, 1.1, 55),  # 55 exactly, where floating point has a little more
        (1, 4, 16, 1.2, 1),  # 0.3: a place for the only token
        (3, 2, 5, 1.2, 2),  # 1.44
        (6, 2, 4, 8.0, 6),  # 24, but an expert is never asked for by more than all tokens
    ],
)
def test_capacity(num_tokens, top_k, num_experts, factor, expected):
    assert capacity(num_tokens, top_k, num_experts, factor) == expected


def test_balance_loss_by_hand():
    """Assignments 3, 1, 0 of 4; mean probabilities 0.6, 0.3, 0.1: 3·(3/4·0.6 + 1/4·0.3) = 1.575."""
    probabilities = [[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]
    assert balance_loss(probabilities, [[0, 1], [0, 0]], 0.01) == pytest.approx(0.01575, rel=1e-12)


def test_balance_loss_of_equal_shares_is_alpha():
    probabilities = np.full((4, 4), 0.25)
    assert balance_loss(probabilities, [[0, 1], [2, 3], [0, 1], [2, 3]], 0.01) == pytest.approx(
        0.01, rel=1e-12
    )


# --- the whole model's loss and gradients -------------------------------------------------------------------


def records(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels ``[2, 21]``, a part of which is not trained."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SIZES["vocab_size"], (2, 21))
    return ids, np.where(rng.random(ids.shape) < 0.3, -100, ids)


def test_balance_in_torch_equals_the_loops(folder):
    """Through what really enters each block, for each layer."""
    path, top_k = folder
    ernie, (ids, labels) = load_ernie(path), records(7)
    entered = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, output: entered.append(args[0]))
        for layer in ernie.model.layers
    ]
    with torch.no_grad():
        _, balance = training_loss(ernie, ids, labels, 0.01)
    for hook in hooks:
        hook.remove()
    expected = 0.0
    for layer, hidden in enumerate(entered):
        x = hidden.flatten(0, 1).numpy()
        assert len(x) == 2 * 20
        probabilities, experts, _ = route(x, layer_weights(path, layer)["router"], top_k)
        expected += balance_loss(probabilities, experts, 0.01)
    np.testing.assert_allclose(balance.item(), expected, rtol=1e-5)


def test_loss_without_balance_is_ernies_own(folder):
    ernie, (ids, labels) = load_ernie(folder[0]), records(7)
    with torch.no_grad():
        loss, balance = training_loss(ernie, ids, labels, 0.0)
        expected = ernie(torch.tensor(ids), labels=torch.tensor(labels)).loss
    assert balance == 0.0
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-6)


RELEASED = {
    "model.tok_embeddings.embedding_weight": "transformer.word_embeddings.weight",
    "model.norm_out.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attention.query.weight",
    "attention.wk_v.weight": "self_attention.key_value.weight",
    "attention.wo.weight": "self_attention.dense.weight",
    "attention.wo.bias": "self_attention.dense.bias",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.router.dense.weight": "mlp.router.weight",
    "feed_forward.ffn.w1.weight": "mlp.local_experts.{}.gate_proj.weight",
    "feed_forward.ffn.w3.weight": "mlp.local_experts.{}.up_proj.weight",
    "feed_forward.ffn.w2.weight": "mlp.local_experts.{}.down_proj.weight",
    "feed_forward.ffn.w2.bias": "mlp.local_experts.{}.down_proj.bias",
}


def released(name: str, array: np.ndarray):
    """Release names and parts of an array under one of our names."""
    if not name.startswith("model.layers."):
        return [(RELEASED[name], array)]
    _, _, layer, tail = name.split(".", 3)
    there = f"transformer.h.{layer}.{RELEASED[tail]}"
    if "{}" not in there:
        return [(there, array)]
    experts = array[0, :, 0] if array.ndim == 4 else array
    return [(there.format(e), part) for e, part in enumerate(experts)]


def test_gradients_are_the_slopes_of_the_loss_in_the_released_tensors(tmp_path):
    """The released tensors moved along our gradient, a unit's step: the loss rises by the gradient's norm."""
    sizes = SIZES | {"n_layer": 1, "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2}
    write_hf_folder(tmp_path, sizes, seed=9)
    config, tensors = read_hf_folder(tmp_path)
    ernie, (ids, labels) = load_ernie(tmp_path), records(9)
    _, grads = ernie_loss_and_gradients(ernie, config, ids, labels, 0.01)
    moved_names = set()
    for name, grad in grads.items():
        norm, losses = np.linalg.norm(grad), []
        for size in (-STEP, STEP):
            moved = dict(tensors)
            for there, part in released(name, grad / norm * size):
                moved[there] = tensors[there] + torch.tensor(part)
                moved_names.add(there)
            ernie.load_state_dict(ernie_state(config, moved))
            with torch.no_grad():
                losses.append(sum(training_loss(ernie, ids, labels, 0.01)).item())
        assert (losses[1] - losses[0]) / (2 * STEP) == pytest.approx(norm, rel=0.005), name
    assert moved_names == set(tensors)
