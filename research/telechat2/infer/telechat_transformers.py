"""Decoder layers with ``qkv_concat``: one product for queries, keys and values, and one for gate and up.

Of a tensor-parallel rank ``w_qkv`` holds its rows of wq, the key rows of its heads, their value rows;
``w_gate_hidden`` its rows of w1, then those of w3.
"""

from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.telechat_layer import TelechatFeedForward, TelechatLinear
from research.telechat2.telechat_transformer import TelechatAttention


def join_products(model, config) -> None:
    """Exchange the blocks of a TelechatForCausalLM for those with joined weights.

    Experts, which the published model does not join, stay. The caller restores the parameters' names.
    """
    for layer in model.model.layers:
        layer.attention = JoinedAttention(config, model.kernels)
        if not layer.has_experts:
            layer.feed_forward = JoinedFeedForward(config, model.kernels)


class JoinedAttention(TelechatAttention):
    """TelechatAttention with one product for queries, keys and values."""

    def add_projections(self, config):
        """Make the cells that ``project`` uses."""
        rows = (self.num_heads + 2 * self.n_kv_heads) * self.head_dim
        self.w_qkv = TelechatLinear(config.hidden_size, rows, config)
        self.columns = P.StridedSlice(begin_mask=1, end_mask=1)  # of all rows

    def project(self, x):
        """Queries ``[T, N*D]``, keys and values ``[T, K*D]`` of tokens ``[T, H]``."""
        rows = self.w_qkv(x)
        parts, first = (), 0
        for heads in (self.num_heads, self.n_kv_heads, self.n_kv_heads):
            last = first + heads * self.head_dim
            parts += (self.columns(rows, (0, first), (0, last), (1, 1)),)
            first = last
        return parts


class JoinedFeedForward(TelechatFeedForward):
    """TelechatFeedForward with one product for gate and up."""

    def add_gates(self, config, kernels):
        """Make the cells that ``gated`` uses."""
        self.w_gate_hidden = TelechatLinear(config.hidden_size, 2 * config.intermediate_size, config)
        self.swiglu_joined = kernels.swiglu_joined()

    def gated(self, x):
        """``silu(w1 x) * w3 x``: ``[T, H]`` to ``[T, F]``."""
        return self.swiglu_joined(self.w_gate_hidden(x))
