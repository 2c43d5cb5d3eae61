"""One cell per fused Ascend kernel. Shapes are named as in reference.py, which explains them."""

import math
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import auto_generate
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.model.kernels.moe_dispatch import GatedBias
from research.telechat2.model.kernels.reference import cache_parameter


class RMSNormFused(nn.Cell):
    """Ascend's RmsNorm."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = P.RmsNorm(eps)

    def construct(self, x, weight):
        return self.norm(x, weight)[0]


class SwiGLUFused(nn.Cell):
    """Ascend's Swiglu. Gate and up are stacked on an axis of their own, which no plan ever splits."""

    def __init__(self):
        super().__init__()
        self.stack = P.Stack(axis=1)
        self.swiglu = auto_generate.Swiglu()
        self.reshape = P.Reshape()

    def construct(self, gate, up):
        return self.reshape(self.swiglu(self.stack((gate, up)), 1), gate.shape)


class SwiGLUJoinedFused(nn.Cell):
    """Ascend's Swiglu on a tensor that holds both, as it takes them."""

    def __init__(self):
        super().__init__()
        self.swiglu = auto_generate.Swiglu()

    def construct(self, gate_up):
        return self.swiglu(gate_up, -1)


class RotaryFused(nn.Cell):
    """Ascend's RotaryPositionEmbedding in its half-split mode."""

    def __init__(self):
        super().__init__()
        self.rotary = auto_generate.RotaryPositionEmbedding()

    def construct(self, query, key, query_tables, key_tables):
        # An operator called with a tuple unpacked loses its scope, and with it the mark to be recomputed.
        (cos, sin), (key_cos, key_sin) = query_tables, key_tables
        return self.rotary(query, cos, sin, 0), self.rotary(key, key_cos, key_sin, 0)


class RotaryTokensFused(nn.Cell):
    """Ascend's ApplyRotaryPosEmb; ``lengths`` ``[B]`` int32 are the sequences' lengths in tokens.

    Format 2: half-split, a row of the tables for each token (CANN's description; MindFormers itself gives
    the whole tables in prefill, so try a batch of prompts first on a new NPU stack). The kernel rotates
    16-bit tensors only; with float32 tables it computes in float32, which it can for float16.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.rotary = auto_generate.ApplyRotaryPosEmb(2)
        self.cast = P.Cast()

    def construct(self, query, key, cos, sin, lengths):
        if cos.dtype == ms.float32:
            query, key = self.cast(query, ms.float16), self.cast(key, ms.float16)
        return self.rotary(query, key, cos, sin, lengths)


@cache
def causal_triangle() -> Tensor:
    """What FlashAttentionScore expands to any length (sparse mode 2), uint8 ``[2048, 2048]``."""
    return Tensor(np.triu(np.ones((2048, 2048), np.uint8), 1))


class SequenceInputsFused(nn.Cell):
    """The fused kernels broadcast: cos and sin ``[1, S, 1, D]``, and a mask in uint8.

    The mask of packed documents is ``[B, 1, S, S]``, or their cumulative lengths ``[n]``; that of others is
    causal_triangle.
    """

    def __init__(self):
        super().__init__()
        self.mask = causal_triangle()
        self.cast = P.Cast()

    def construct(self, cos, sin, batch_size, masked):
        length, head_dim = cos.shape
        tables = (cos.reshape(1, length, 1, head_dim), sin.reshape(1, length, 1, head_dim))
        if masked is None:
            return tables, tables, self.mask
        return tables, tables, masked if len(masked.shape) == 1 else self.cast(masked, ms.uint8)


class CausalAttentionFused(nn.Cell):
    """Ascend's FlashAttentionScore on whole sequences, ``[B, N, S, D]`` on ``[B, K, S, D]``.

    With ``masked`` the mask is ``[B, 1, S, S]``, else causal_triangle.

    Its softmax is computed in float32, whatever ``softmax_compute_type`` is.
    """

    def __init__(self, num_heads: int, head_dim: int, masked: bool):
        super().__init__()
        self.flash = P.nn_ops.FlashAttentionScore(
            head_num=num_heads, scale_value=1.0 / math.sqrt(head_dim), input_layout="BNSD",
            sparse_mode=0 if masked else 2,
        )  # fmt: skip

    def construct(self, query, key, value, mask):
        return self.flash(query, key, value, None, None, None, mask)[3]


class DocumentAttentionFused(nn.Cell):
    """FlashAttentionScore in its variable-length form: packed documents, each of which sees itself only.

    Queries ``[B, S, N, D]``, keys and values ``[B, S, K, D]``, and what CumulativeLengths returns, to
    ``[B*S, N, D]``. Entries that are left over make documents of no length: CANN's description forbids those
    among keys, MindFormers' own records of the kind (``actual_seq_len``) have them.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.flash = P.nn_ops.FlashAttentionScore(
            head_num=num_heads, scale_value=1.0 / math.sqrt(head_dim), input_layout="TND", sparse_mode=2,
            next_tokens=0,
        )  # fmt: skip
        self.triangle = causal_triangle()
        self.reshape = P.Reshape()

    def construct(self, query, key, value, lengths):
        b, s, n, d = query.shape
        tokens, keys = (b * s, n, d), (b * s, key.shape[2], d)
        query, key, value = self.reshape(query, tokens), self.reshape(key, keys), self.reshape(value, keys)
        return self.flash(query, key, value, None, None, None, self.triangle, None, lengths, lengths)[3]


class PagedInputsFused(nn.Cell):
    """The fused kernels take slots, tables and lengths as they are, and a fixed ``[128, 128]`` triangle.

    CANN's compressed mask: 1 in the upper triangle where the products are accumulated in float32, which they
    are for bfloat16, else the value added to the scores.
    """

    def __init__(self, config, parts: int = 1):
        super().__init__()
        dtype = config.compute_dtype
        triangle = np.triu(np.ones((128, 128), np.float32), 1)
        self.mask = Tensor(triangle * (1.0 if dtype == ms.bfloat16 else -10000.0), dtype)

    def prefill(self, positions, lengths, block_tables, slots):
        """See PagedInputsReference."""
        return slots, block_tables, self.mask

    def decode(self, positions, lengths, block_tables, slots):
        """See PagedInputsReference."""
        return slots, block_tables, None


class PagedAttentionFused(nn.Cell):
    """Ascend's ReshapeAndCache, FlashAttentionScore (prefill) and PagedAttention (decode).

    Holds ``key_cache`` and ``value_cache`` ``[num_blocks, block_size, K, D]``; its other tensors are those of
    PagedAttentionReference. The kernels' runtime reads the lengths on the host, from the graph's input named
    ``batch_valid_length``: the model's ``construct`` must keep that name.
    """

    def __init__(self, config, parts: int = 1):
        super().__init__()
        num_heads, n_kv_heads = config.num_heads // parts, config.n_kv_heads // parts
        shape = (config.num_blocks, config.block_size, n_kv_heads, config.head_dim)
        self.key_cache = cache_parameter("key_cache", shape, config.compute_dtype)
        self.value_cache = cache_parameter("value_cache", shape, config.compute_dtype)
        scale = 1.0 / math.sqrt(config.head_dim)
        self.write = auto_generate.ReshapeAndCache()
        self.paged = auto_generate.PagedAttention(num_heads, scale, n_kv_heads)
        self.flash = P.nn_ops.FlashAttentionScore(
            head_num=num_heads, scale_value=scale, input_layout="TH", sparse_mode=0, next_tokens=0,
        )  # fmt: skip
        self.expand = P.ExpandDims()
        self.reshape = P.Reshape()
        self.width = num_heads * config.head_dim

    def prefill(self, query, key, value, inputs, lengths):
        """See PagedAttentionReference."""
        slots, _, mask = inputs
        written = self.write(
            self.expand(key, 0), self.expand(value, 0), self.key_cache, self.value_cache, slots
        )
        query = ops.depend(query, written)
        return self.flash(query, key, value, None, None, None, mask, None, lengths, lengths)[3]

    def decode(self, query, key, value, inputs, lengths):
        """See PagedAttentionReference."""
        slots, tables, _ = inputs
        written = self.write(
            self.expand(key, 1), self.expand(value, 1), self.key_cache, self.value_cache, slots
        )
        query = ops.depend(self.expand(query, 1), written)
        out = self.paged(query, self.key_cache, self.value_cache, tables, lengths)
        return self.reshape(out, (-1, self.width))


class GroupedMatMul(nn.Cell):
    """Ascend's GroupedMatmul: rows that lie expert after expert, times each expert's weight.

    Inputs: rows ``[n, in]``, weight ``[E, in, out]``, and group_list ``[E]`` int64, the cumulative number of
    rows of the experts.

    Output: ``[n, out]``.
    """

    def __init__(self):
        super().__init__()
        self.grouped_matmul = auto_generate.GroupedMatmul(split_item=3, group_type=0)

    def construct(self, rows, weight, group_list):
        return self.grouped_matmul([rows], [weight], None, None, None, None, None, group_list)[0]


class GroupedMatMulTransposed(nn.Cell):
    """GroupedMatMul with a weight ``[E, out, in]``, as published, of which it makes no transposed copy.

    GroupedMatmul reads transposed views. Its own gradient would return the weight's as ``[E, in, out]``, to
    be copied before it can be added up; here it has the weight's shape.
    """

    def __init__(self):
        super().__init__()
        self.product = GroupedMatMul()
        self.sum_by_expert = auto_generate.GroupedMatmul(split_item=3, group_type=2)
        self.transpose = auto_generate.TransposeExtView()
        self.zeros = P.ZerosLike()

    def construct(self, rows, weight, group_list):
        return self.product(rows, self.transpose(weight, -1, -2), group_list)

    def bprop(self, rows, weight, group_list, out, dout):
        """Gradients of rows ``[n, in]`` and weight ``[E, out, in]``."""
        columns = self.transpose(dout, -1, -2)
        dweight = self.sum_by_expert([columns], [rows], None, None, None, None, None, group_list)[0]
        return self.product(dout, weight, group_list), dweight, self.zeros(group_list)


class TopKFused(nn.Cell):
    """Ascend's TopK; see moe_dispatch.TopKReference, which it equals where the k + 1 largest values differ.

    Of equal values MindSpore documents TopK to return the lower index first. CANN's description of aclnnTopk,
    which runs it, does not mention them, and no NPU was available to try: with equal probabilities the
    experts, or their order, may differ from those of the reference implementation.
    """

    def __init__(self, num_experts: int, top_k: int):
        super().__init__()
        self.k = top_k
        self.numbers = Tensor(np.arange(num_experts, dtype=np.int32))
        self.top_k = P.TopK()
        self.equal = P.Equal()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, probabilities):
        experts = self.top_k(probabilities, self.k)[1]
        chosen = self.equal(self.reshape(experts, (-1, self.k, 1)), self.numbers)
        return experts, self.cast(chosen, ms.float32)


class DroplessExpertsFused(nn.Cell):
    """Ascend's MoeTokenPermute, GroupedMatmul and MoeTokenUnpermute; see DroplessExpertsReference.

    Tokens lie expert after expert without padding. GroupedMatmul has no gradient with a bias, which is added
    by a product of its own.
    """

    def __init__(self, settings, swiglu: nn.Cell, transposed: bool = False):
        super().__init__()
        self.row_counts = RowCounts(settings.num_experts)
        self.permute = auto_generate.MoeTokenPermute()
        self.unpermute = auto_generate.MoeTokenUnpermute()
        self.product = GroupedMatMul() if transposed else GroupedMatMulTransposed()
        self.swiglu = swiglu
        self.gated_bias = GatedBias(settings.num_experts)
        self.ones = P.OnesLike()
        self.add = P.Add()
        self.reshape = P.Reshape()

    def construct(self, x, experts, gates, w1, w3, w2, bias):
        y = self.without_bias(x, experts, gates, self.row_counts(experts), w1, w3, w2)
        return self.add_bias(y, experts, gates, bias)

    def without_bias(self, x, experts, gates, counts, w1, w3, w2):
        """The outputs ``[T, H]`` without biases; ``counts`` ``[E]`` int32 are the rows of the experts."""
        group_list = self.row_counts.cumulative(counts)
        rows, order = self.permute(x, experts)
        rows = self.reshape(rows, (-1, x.shape[1]))  # which is lost where their number is not known
        hidden = self.swiglu(self.product(rows, w1, group_list), self.product(rows, w3, group_list))
        return self.unpermute(self.product(hidden, w2, group_list), order, gates)

    def add_bias(self, y, experts, gates, bias):
        """Outputs ``y`` ``[T, H]`` plus the biases of their experts."""
        return self.add(y, self.gated_bias(experts, gates, self.ones(experts), bias))


class RowCounts(nn.Cell):
    """How many rows each expert has of experts ``[T, k]`` int32: ``[E]`` int32."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.experts = Tensor(np.arange(num_experts, dtype=np.int32))
        self.equal = P.Equal()
        self.sum = P.ReduceSum()
        self.cumsum = P.CumSum()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, experts):
        chosen = self.equal(self.reshape(experts, (-1, 1)), self.experts)
        return self.sum(self.cast(chosen, ms.int32), 0)

    def cumulative(self, counts):
        """Counts ``[E]`` int32 as GroupedMatmul's group_list ``[E]`` int64."""
        return self.cast(self.cumsum(counts, 0), ms.int64)
