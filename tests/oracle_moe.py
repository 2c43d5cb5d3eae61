"""The oracles of the mixture of experts: the same folder as an Ernie 4.5, and plain loops in NumPy.

A TeleChat2 MoE *is* an Ernie 4.5 MoE without shared experts and with biases on the output and the experts'
down projections, once query and key rows go from half-split to interleaved order (transformers 4.54 to 4.57;
later ones have no expert biases). The loops state the routing and dropping rules, which Ernie lacks; they
import neither torch nor the project.
"""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
from oracle import read_hf_folder, shared_gradients

RULES = ("k-major", "token-major")


# --- one block, token by token ------------------------------------------------------------------------------


def capacity(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Most assignments an expert takes: ``min(T, ceil(k·T·factor/E))``, the factor read as the decimal it is.

    In floating point 4·200·1.1/16 is more than 55 and its ceiling 56.
    """
    share = Fraction(str(capacity_factor)) * top_k * num_tokens / num_experts
    return min(num_tokens, math.ceil(share))


def kept_assignments(experts, num_experts: int, limit: int, rule: str) -> np.ndarray:
    """Which of the assignments ``experts`` ``[T, k]`` an expert with ``limit`` places takes; bool ``[T, k]``.

    "k-major": first choices of all tokens in token order, then all second choices, …
    "token-major": all choices of token 0, then those of token 1, …
    """
    experts = np.asarray(experts)
    num_tokens, top_k = experts.shape
    if rule == "k-major":
        order = [(token, choice) for choice in range(top_k) for token in range(num_tokens)]
    elif rule == "token-major":
        order = [(token, choice) for token in range(num_tokens) for choice in range(top_k)]
    else:
        raise ValueError(f"the rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    taken = [0] * num_experts
    kept = np.zeros((num_tokens, top_k), bool)
    for token, choice in order:
        expert = experts[token, choice]
        kept[token, choice] = taken[expert] < limit
        taken[expert] += 1
    return kept


def route(x, router, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities ``[T, E]``, chosen experts and their gates ``[T, k]`` of tokens ``x`` ``[T, H]``.

    Experts in falling order of probability, the lower index first where two are equal; gates are the chosen
    probabilities divided by (their sum + 1e-9). float64.
    """
    probabilities, experts, gates = [], [], []
    for token in np.asarray(x, np.float64):
        logits = [float(row @ token) for row in np.asarray(router, np.float64)]
        exps = [math.exp(logit - max(logits)) for logit in logits]
        p = [value / sum(exps) for value in exps]
        chosen = sorted(range(len(p)), key=lambda expert: (-p[expert], expert))[:top_k]
        total = sum(p[expert] for expert in chosen) + 1e-9
        probabilities.append(p)
        experts.append(chosen)
        gates.append([p[expert] / total for expert in chosen])
    return np.array(probabilities), np.array(experts), np.array(gates)


def expert_output(token, weights: dict, expert: int) -> np.ndarray:
    """``W2(silu(W1 x)·W3 x) + b2`` of one token ``[H]`` and one expert, float64."""
    w1, w3, w2, b2 = (np.asarray(weights[name][expert], np.float64) for name in ("w1", "w3", "w2", "b2"))
    gate = w1 @ token
    return w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ token)) + b2


def moe_block(x, weights: dict, top_k: int, capacity_factor: float | None = None, rule: str = "k-major"):
    """The block's output ``[T, H]`` for tokens ``x`` ``[T, H]``, float64.

    ``weights``: ``router`` [E, H], ``w1`` and ``w3`` [E, F, H], ``w2`` [E, H, F], ``b2`` [E, H]. With
    ``capacity_factor`` an assignment that ``kept_assignments`` drops counts with gate 0, and the gates of the
    others stay as they are; without one nothing is dropped.
    """
    x = np.asarray(x, np.float64)
    num_experts = len(weights["router"])
    _, experts, gates = route(x, weights["router"], top_k)
    if capacity_factor is not None:
        limit = capacity(len(x), top_k, num_experts, capacity_factor)
        gates = gates * kept_assignments(experts, num_experts, limit, rule)
    y = np.zeros_like(x)
    for token in range(len(x)):
        for expert, gate in zip(experts[token], gates[token], strict=True):
            y[token] += gate * expert_output(x[token], weights, expert)
    return y


def balance_loss(probabilities, experts, alpha: float) -> float:
    """``alpha·E·sum f_i P_i``: f_i the share of the k·T assignments on expert i, P_i its mean probability."""
    probabilities, experts = np.asarray(probabilities, np.float64), np.asarray(experts)
    num_tokens, num_experts = probabilities.shape
    total = 0.0
    for expert in range(num_experts):
        share = sum(int(chosen == expert) for chosen in experts.reshape(-1)) / experts.size
        total += share * sum(probabilities[:, expert]) / num_tokens
    return alpha * num_experts * total


def layer_weights(folder: Path, layer: int) -> dict[str, np.ndarray]:
    """One layer's ``weights`` for ``moe_block``, from a folder in the torch release's names."""
    config, tensors = read_hf_folder(folder)
    mlp = f"transformer.h.{layer}.mlp"
    names = {
        "w1": "gate_proj.weight",
        "w3": "up_proj.weight",
        "w2": "down_proj.weight",
        "b2": "down_proj.bias",
    }
    stacked = {
        ours: np.stack(
            [tensors[f"{mlp}.local_experts.{e}.{name}"].numpy() for e in range(config["num_experts"])]
        )
        for ours, name in names.items()
    }
    return {"router": tensors[f"{mlp}.router.weight"].numpy()} | stacked


# --- the whole model ----------------------------------------------------------------------------------------


def interleaved(rows, heads: int):
    """Rows ``[heads·d, …]`` whose pairs are (j, j + d/2), with the pairs side by side: (2j, 2j + 1)."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def half_split(rows, heads: int):
    """The inverse of ``interleaved``."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def load_ernie(folder: Path, rope_theta: float = 10000.0):
    """An HF TeleChat2 MoE folder as ``transformers.Ernie4_5_MoeForCausalLM``: fp32, eager, eval mode.

    Exact but for the 1e-9 in the gates' divisor; the biases TeleChat2 lacks are zeros.
    """
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    config, telechat = read_hf_folder(folder)
    n_heads = config["n_head"]
    model = Ernie4_5_MoeForCausalLM(
        Ernie4_5_MoeConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["n_layer"],
            num_attention_heads=n_heads,
            num_key_value_heads=config.get("num_key_value_heads", n_heads),
            rms_norm_eps=config["layer_norm_epsilon"],
            rope_theta=rope_theta,
            max_position_embeddings=config["seq_length"],
            use_bias=True,
            moe_intermediate_size=config["ffn_hidden_size"],
            moe_k=config["num_experts_per_tok"],
            moe_num_experts=config["num_experts"],
            moe_num_shared_experts=0,
            moe_layer_start_index=0,
            moe_layer_interval=1,
            moe_norm_min=1e-30,  # below every sum: it divides by the sum itself
            tie_word_embeddings=config["tie_word_embeddings"],
            bos_token_id=config["bos_token_id"],
            eos_token_id=config["eos_token_id"],
            pad_token_id=None,  # a padding row of the embedding would lose its gradient
            attn_implementation="eager",
        )
    )
    model.load_state_dict(ernie_state(config, telechat), strict=True)
    return model.eval()


def ernie_state(config: dict, telechat: dict) -> dict:
    """The release's ``config`` and tensors as Ernie's state dict."""
    import torch

    hidden, n_heads = config["hidden_size"], config["n_head"]
    n_kv_heads, head_dim = config.get("num_key_value_heads", n_heads), hidden // n_heads
    embedding = telechat["transformer.word_embeddings.weight"]
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": telechat["transformer.ln_f.weight"],
        "lm_head.weight": telechat.get("lm_head.weight", embedding),
        "lm_head.bias": torch.zeros(config["vocab_size"]),
    }
    for layer in range(config["n_layer"]):
        there, here = f"transformer.h.{layer}", f"model.layers.{layer}"
        key_value = telechat[f"{there}.self_attention.key_value.weight"].view(n_kv_heads, 2, head_dim, hidden)
        key, value = (key_value[:, part].reshape(n_kv_heads * head_dim, hidden) for part in (0, 1))
        query = telechat[f"{there}.self_attention.query.weight"]
        state |= {
            f"{here}.input_layernorm.weight": telechat[f"{there}.input_layernorm.weight"],
            f"{here}.post_attention_layernorm.weight": telechat[f"{there}.post_attention_layernorm.weight"],
            f"{here}.self_attn.q_proj.weight": interleaved(query, n_heads),
            f"{here}.self_attn.q_proj.bias": torch.zeros(n_heads * head_dim),
            f"{here}.self_attn.k_proj.weight": interleaved(key, n_kv_heads),
            f"{here}.self_attn.k_proj.bias": torch.zeros(n_kv_heads * head_dim),
            f"{here}.self_attn.v_proj.weight": value,
            f"{here}.self_attn.v_proj.bias": torch.zeros(n_kv_heads * head_dim),
            f"{here}.self_attn.o_proj.weight": telechat[f"{there}.self_attention.dense.weight"],
            f"{here}.self_attn.o_proj.bias": telechat[f"{there}.self_attention.dense.bias"],
            f"{here}.mlp.gate.weight": telechat[f"{there}.mlp.router.weight"],
            f"{here}.mlp.moe_statics.e_score_correction_bias": torch.zeros(1, config["num_experts"]),
        }
        for e in range(config["num_experts"]):
            expert, source = f"{here}.mlp.experts.{e}", f"{there}.mlp.local_experts.{e}"
            state |= {
                f"{expert}.{name}": telechat[f"{source}.{name}"]
                for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "down_proj.bias")
            }
            for name in ("gate_proj.bias", "up_proj.bias"):
                state[f"{expert}.{name}"] = torch.zeros(config["ffn_hidden_size"])
    return state


def drop_beyond_capacity(ernie, capacity_factor: float, rule: str) -> None:
    """Make ``ernie``'s blocks drop what does not fit, as ``moe_block`` does; the tokens are one call's."""
    import torch

    def block(mlp):
        def forward(hidden):
            x = hidden.reshape(-1, hidden.shape[-1])
            logits = mlp.gate(x)
            top, experts = torch.topk(torch.softmax(logits, -1), mlp.top_k)
            limit = capacity(len(x), mlp.top_k, mlp.num_experts, capacity_factor)
            kept = torch.tensor(kept_assignments(experts, mlp.num_experts, limit, rule))
            gates = top / (top.sum(-1, keepdim=True) + 1e-9) * kept
            y = torch.zeros_like(x)
            for e, expert in enumerate(mlp.experts):
                y = y + expert(x) * (gates * (experts == e)).sum(-1, keepdim=True)
            return y.reshape(hidden.shape), logits

        return forward

    for layer in ernie.model.layers:
        layer.mlp.forward = block(layer.mlp)


def training_loss(ernie, ids, labels, alpha: float):
    """Mean cross entropy over trained tokens, and the balance loss summed over layers; two torch scalars.

    ``ids``, ``labels`` ``[B, S + 1]``: the first S ids of each row are read, all of them count for the
    balance, and the last S labels are targets where they are not -100.
    """
    import torch

    router_logits = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, logits: router_logits.append(logits))
        for layer in ernie.model.layers
    ]
    logits = ernie(torch.tensor(ids)[:, :-1]).logits
    for hook in hooks:
        hook.remove()
    targets = torch.tensor(labels)[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100)
    balance = torch.zeros(())
    for layer_logits in router_logits:
        probabilities = torch.softmax(layer_logits.flatten(0, -2), -1)
        experts = torch.topk(probabilities, ernie.config.moe_k).indices
        num_experts = probabilities.shape[-1]
        shares = torch.bincount(experts.flatten(), minlength=num_experts) / experts.numel()
        balance = balance + alpha * num_experts * (shares * probabilities.mean(0)).sum()
    return loss, balance


def ernie_loss_and_gradients(ernie, sizes: dict, ids, labels, alpha: float) -> tuple[float, dict]:
    """``training_loss``'s sum, and every gradient of it under our names, experts stacked."""
    ernie.zero_grad()
    total = sum(training_loss(ernie, ids, labels, alpha))
    total.backward()
    grads = shared_gradients(ernie, sizes, half_split)
    for i, layer in enumerate(ernie.model.layers):
        prefix, experts = f"model.layers.{i}.feed_forward", layer.mlp.experts
        grads |= {
            f"{prefix}.router.dense.weight": layer.mlp.gate.weight.grad.numpy(),
            f"{prefix}.ffn.w1.weight": _stacked_gradients([e.gate_proj.weight for e in experts]),
            f"{prefix}.ffn.w3.weight": _stacked_gradients([e.up_proj.weight for e in experts]),
            f"{prefix}.ffn.w2.weight": _stacked_gradients([e.down_proj.weight for e in experts]),
            f"{prefix}.ffn.w2.bias": _stacked_gradients([e.down_proj.bias for e in experts])[None, :, None],
        }
    return total.item(), grads


def _stacked_gradients(parameters) -> np.ndarray:
    """``[E, …]``; zeros for an expert that no token went to."""
    return np.stack([np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for p in parameters])
