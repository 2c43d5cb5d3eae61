"""What a rank has of embedding and decoder layers, and which of their rows are joined for one product.

Everything else is the training model's cells. With ``qkv_concat`` a rank's ``w_qkv`` holds its rows of wq,
the key rows of its heads, their value rows; its ``w_gate_hidden`` its rows of w1, those of w3.
"""

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.model.kernels import select
from research.telechat2.telechat_layer import TelechatFeedForward, TelechatLinear
from research.telechat2.telechat_transformer import TelechatAttention, TelechatDecoderLayer


class ParallelEmbedding(nn.Cell):
    """TelechatEmbedding whose vocabulary several ranks share: each looks up its own ids, and they add up.

    Every rank gets ``[..., H]`` of all ids ``[...]``; all summands but one are zero, so the sum is exact.
    """

    def __init__(self, config, ranks):
        super().__init__()
        rows = config.vocab_size // ranks.size
        self.embedding_weight = Parameter(
            initializer(
                Normal(config.sigma, config.mean), (rows, config.hidden_size), config.embedding_init_type
            ),
            name="embedding_weight",
        )
        self.first, self.rows = Tensor(ranks.rank * rows, ms.int32), Tensor(rows, ms.int32)
        self.zero = Tensor(0, ms.int32)
        self.dtype = config.res_dtype
        self.sub = P.Sub()
        self.not_below = P.GreaterEqual()
        self.below = P.Less()
        self.both = P.LogicalAnd()
        self.select = P.Select()
        self.zeros = P.ZerosLike()
        self.gather = P.Gather()
        self.mask = P.Mul()
        self.expand = P.ExpandDims()
        self.cast = P.Cast()
        self.add_summands = ranks.sum()

    def construct(self, tokens):
        index = self.sub(tokens, self.first)
        own = self.both(self.not_below(index, self.zero), self.below(index, self.rows))
        index = self.select(own, index, self.zeros(index))
        found = self.cast(self.gather(self.embedding_weight, index, 0), self.dtype)
        return self.add_summands(self.mask(found, self.expand(self.cast(own, self.dtype), -1)))


class JoinedLogits(nn.Cell):
    """The ranks' logits ``[T, V / n]`` as ``[T, V]``, on every rank."""

    def __init__(self, ranks):
        super().__init__()
        self.size = ranks.size
        self.gather = ranks.gather()
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()

    def construct(self, logits):
        width = logits.shape[-1]
        parts = self.reshape(self.gather(logits), (self.size, -1, width))
        return self.reshape(self.transpose(parts, (1, 0, 2)), (-1, self.size * width))


class JoinedAttention(TelechatAttention):
    """TelechatAttention with one product for queries, keys and values."""

    def add_projections(self, config):
        """Make the cells that ``project`` uses."""
        query, key = self.num_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.w_qkv = TelechatLinear(config.hidden_size, query + 2 * key, config)
        self.borders = (0, query, query + key, query + 2 * key)
        self.columns = P.StridedSlice(begin_mask=1, end_mask=1)  # of all rows

    def project(self, x):
        """Queries ``[T, N*D]``, keys and values ``[T, K*D]`` of tokens ``[T, H]``."""
        rows = self.w_qkv(x)
        parts = ()
        for i in range(3):
            parts += (self.columns(rows, (0, self.borders[i]), (0, self.borders[i + 1]), (1, 1)),)
        return parts


class JoinedFeedForward(TelechatFeedForward):
    """TelechatFeedForward with one product for gate and up."""

    def add_gates(self, hidden, width, config):
        """Make the cells that ``gated`` uses."""
        self.w_gate_hidden = TelechatLinear(hidden, 2 * width, config)
        self.swiglu_joined = select.swiglu_joined()

    def gated(self, x):
        """``silu(w1 x) * w3 x``: ``[T, H]`` to ``[T, F]``."""
        return self.swiglu_joined(self.w_gate_hidden(x))


class JoinedDecoderLayer(TelechatDecoderLayer):
    """TelechatDecoderLayer with joined rows; experts, which the published model does not join, stay."""

    attention_cell, feed_forward_cell = JoinedAttention, JoinedFeedForward
