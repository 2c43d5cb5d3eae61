"""What experts make of their tokens as a loop over choices in torch, float64, for its gradients."""

import torch


def to_torch(array) -> torch.Tensor:
    """A leaf in float64 that has a gradient."""
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def weighted_experts(x, experts, gates, w1, w3, w2, bias) -> torch.Tensor:
    """``y[t] = sum over j of gates[t, j] * (w2 (silu(w1 x[t]) * w3 x[t]) + bias)`` of ``experts[t, j]``.

    x ``[T, H]``, experts and gates ``[T, k]``, w1 and w3 ``[E, F, H]``, w2 ``[E, H, F]``, bias
    ``[1, E, 1, H]``; a dropped choice is one of gate 0.
    """
    tokens = []
    for t, token in enumerate(x):
        y = torch.zeros_like(token)
        for expert, gate in zip(experts[t], gates[t], strict=True):
            hidden = torch.nn.functional.silu(w1[expert] @ token) * (w3[expert] @ token)
            y = y + gate * (w2[expert] @ hidden + bias[0, expert, 0])
        tokens.append(y)
    return torch.stack(tokens)
