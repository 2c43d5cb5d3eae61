"""The oracle with another rotary embedding: transformers' own, in a model that is otherwise the same."""

import copy
import math

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def with_rope(oracle, theta: float, scaling: dict | None = None):
    """A LlamaForCausalLM with the weights of ``oracle``, and ``rope_theta`` and ``rope_scaling`` as given."""
    config = copy.deepcopy(oracle.config)
    config.rope_theta, config.rope_scaling = theta, scaling
    other = copy.copy(oracle)
    other._modules = dict(oracle._modules)
    other.model = copy.copy(oracle.model)
    other.model._modules = dict(oracle.model._modules)
    other.model.rotary_emb = LlamaRotaryEmbedding(config)
    return other


def torch_release(length: int, base: int, trained: int) -> tuple[int, float]:
    """alpha and mscale as the torch release computes them, in floating point."""
    length = max(length, trained)
    alpha = max(2 ** math.ceil(math.log2(length / base) + 1) - 1, 1)
    return alpha, 0.1 * math.log(length / trained) + 1 if length > trained else 1.0


class ExactRotary(torch.nn.Module):
    """transformers' embedding with float64 angles: in its float32 those of ten thousand are off by 1e-3."""

    def __init__(self, width: int, theta: float, scale: float):
        super().__init__()
        self.frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        self.scale = scale

    def forward(self, x, position_ids):
        """cos and sin ``[B, S, D]`` of the positions ``[B, S]``."""
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return (angles.cos() * self.scale).to(x.dtype), (angles.sin() * self.scale).to(x.dtype)


def with_exact_dynamic_ntk(oracle, length: int, trained: int):
    """As with_dynamic_ntk, for positions in the thousands."""
    width = oracle.config.head_dim
    alpha, mscale = torch_release(length, trained, trained)
    other = with_rope(oracle, 10000.0)
    other.model.rotary_emb = ExactRotary(width, 10000.0 * alpha ** (width / (width - 2)), mscale)
    return other


def with_dynamic_ntk(oracle, length: int, trained: int, base: int | None = None):
    """The oracle with the factor that a sequence of ``length`` tokens has."""
    width = oracle.config.head_dim
    alpha, mscale = torch_release(length, base or trained, trained)
    ones = [1.0] * (width // 2)
    scaling = {
        "rope_type": "longrope", "long_factor": ones, "short_factor": ones, "attention_factor": mscale
    }  # fmt: skip
    return with_rope(oracle, 10000.0 * alpha ** (width / (width - 2)), scaling)
