"""Reference implementations: what the fused Ascend kernels do, by plain operators that every target has.

A cell has the signature, shapes and meaning of the fused cell of the same name in ascend.py.
B: sequences, S: tokens of each, T: tokens of all sequences one after the other without padding, N: query
heads, K: key/value heads, D: channels of a head.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops import operations as P  # noqa: N812


class RMSNormReference(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in the dtype of ``x``.

    With r = 1 / sqrt(mean(x^2) + eps) and g = dy * w the gradients are ``dx = r g - x r^3 / H sum(g x)`` and
    ``dw = sum over tokens of r x dy``; both sums are matrix products: a CPU is slower at reductions.
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.square = P.Square()
        self.mean = P.ReduceMean(keep_dims=True)
        self.rsqrt = P.Rsqrt()
        self.matmul = P.MatMul()
        self.matmul_ta = P.MatMul(transpose_a=True)

    def _inverse(self, x):
        return self.rsqrt(self.mean(self.square(x), -1) + self.eps)

    def construct(self, x, weight):
        return x * self._inverse(x) * weight

    def bprop(self, x, weight, out, dout):
        """Gradients of x and weight."""
        inverse = self._inverse(x)
        product = dout * x
        correction = self.matmul(product, weight.reshape(-1, 1)) * (inverse * inverse * inverse / x.shape[-1])
        dx = dout * weight * inverse - x * correction
        return dx, self.matmul_ta(inverse, product).reshape(weight.shape)


class SwiGLUReference(nn.Cell):
    """``silu(gate) * up``, both ``[T, F]``.

    With s = sigmoid(gate) the gradient of the gate is ``dy * up * (s + silu(gate) (1 - s))``.
    """

    def __init__(self):
        super().__init__()
        self.sigmoid = P.Sigmoid()

    def construct(self, gate, up):
        return gate * self.sigmoid(gate) * up

    def bprop(self, gate, up, out, dout):
        """Gradients of gate and up."""
        sigmoid = self.sigmoid(gate)
        silu = gate * sigmoid
        return dout * up * (sigmoid + silu - silu * sigmoid), dout * silu


class SwiGLUJoinedReference(nn.Cell):
    """SwiGLUReference of one tensor ``[T, 2F]``: the gate's channels, then up's."""

    def __init__(self):
        super().__init__()
        self.split = P.Split(-1, 2)
        self.swiglu = SwiGLUReference()

    def construct(self, gate_up):
        gate, up = self.split(gate_up)
        return self.swiglu(gate, up)


class RotaryReference(nn.Cell):
    """Half-split rotation of queries ``[B, S, N, D]`` and keys ``[B, S, K, D]``, each by its own cos and sin.

    ``x * cos + (-x2, x1) * sin``, where x1 and x2 are the first and second half of the channels.
    """

    def __init__(self):
        super().__init__()
        self.split = P.Split(-1, 2)
        self.concat = P.Concat(-1)

    def rotate(self, x, cos, sin):
        """Rotate one tensor."""
        first, second = self.split(x)
        return x * cos + self.concat((-second, first)) * sin

    def construct(self, query, key, query_tables, key_tables):
        return self.rotate(query, *query_tables), self.rotate(key, *key_tables)


class RotaryTokensReference(nn.Cell):
    """Half-split rotation of ``[T, N*D]`` queries and ``[T, K*D]`` keys by ``[T, D]`` tables."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.reshape = P.Reshape()
        self.rotary = RotaryReference()

    def heads(self, x):
        """``[T, N*D]`` as ``[T, N, D]``."""
        return self.reshape(x, (-1, x.shape[-1] // self.head_dim, self.head_dim))

    def construct(self, query, key, cos, sin, lengths):
        tables = (self.reshape(cos, (-1, 1, self.head_dim)), self.reshape(sin, (-1, 1, self.head_dim)))
        q, k = self.rotary(self.heads(query), self.heads(key), tables, tables)
        return self.reshape(q, (-1, query.shape[-1])), self.reshape(k, (-1, key.shape[-1]))


class WeightedValues(nn.Cell):
    """``softmax(scores) @ values``: ``[B, K, S, L]`` on ``[B, K, L, D]`` to ``[B, K, S, D]``.

    The gradient is FlashAttention's (Dao et al. 2022, section 3.1), ``dS = P * (dO V^T - rowsum(dO * O))``
    with the row sums taken over D and subtracted inside the product, by one more column: MindSpore's own
    Softmax gradient makes four passes over ``[S, L]`` on a CPU.
    """

    def __init__(self):
        super().__init__()
        self.softmax = P.Softmax(-1)
        self.matmul = P.BatchMatMul()
        self.matmul_ta = P.BatchMatMul(transpose_a=True)
        self.matmul_tb = P.BatchMatMul(transpose_b=True)
        self.mul = P.Mul()
        self.sum = P.ReduceSum(keep_dims=True)
        self.concat = P.Concat(-1)
        self.cast = P.Cast()

    def construct(self, scores, values):
        return self.matmul(self.cast(self.softmax(scores), values.dtype), values)

    def bprop(self, scores, values, out, dout):
        """Gradients of scores and values."""
        weights = self.cast(self.softmax(scores), values.dtype)
        row_sums = self.sum(self.mul(dout, out), -1)
        one = ops.ones_like(values[..., :1])
        dweights = self.matmul_tb(self.concat((dout, -row_sums)), self.concat((values, one)))
        dscores = self.cast(self.mul(weights, dweights), scores.dtype)
        return dscores, self.matmul_ta(weights, dout)


class GroupedAttention(nn.Cell):
    """Softmax attention of ``[B, N, S, D]`` queries on ``[B, K, L, D]`` keys and values, N a multiple of K.

    The N / K queries that share a key head lie one after the other on the token axis, so no key is copied.
    ``bias`` is added to the scores ``[B, N, S, L]``. Returns ``[B, N, S, D]``.
    """

    def __init__(self, head_dim: int, softmax_dtype):
        super().__init__()
        self.scale = 1.0 / math.sqrt(head_dim)
        self.softmax_dtype = softmax_dtype
        self.scores = P.BatchMatMul(transpose_b=True)
        self.weighted_values = WeightedValues()
        self.mul = P.Mul()
        self.add = P.Add()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, query, key, value, bias):
        b, n, s, d = query.shape
        k, length = key.shape[1], key.shape[2]
        query = self.reshape(self.mul(query, self.scale), (b, k, n // k * s, d))
        scores = self.cast(self.scores(query, key), self.softmax_dtype)
        scores = self.add(self.reshape(scores, (b, n, s, length)), bias)
        scores = self.reshape(scores, (b, k, n // k * s, length))
        return self.reshape(self.weighted_values(scores, value), (b, n, s, d))


class HeadsFirst(nn.Cell):
    """A kernel on ``[B, N, S, D]`` for operands ``[B, S, N, D]``, its result transposed back."""

    def __init__(self, kernel: nn.Cell):
        super().__init__()
        self.kernel = kernel
        self.transpose_q = P.Transpose()
        self.transpose_kv = P.Transpose()
        self.transpose_out = P.Transpose()

    def construct(self, query, key, value, mask):
        heads_first = (0, 2, 1, 3)
        query = self.transpose_q(query, heads_first)
        key, value = self.transpose_kv(key, heads_first), self.transpose_kv(value, heads_first)
        return self.transpose_out(self.kernel(query, key, value, mask), heads_first)


class SequenceInputsReference(nn.Cell):
    """What the kernels on whole sequences need besides their operands, made once for all layers.

    A CPU works on equal shapes several times faster than it broadcasts, so everything has its full shape.

    Inputs: cos and sin ``[S, D]`` of positions 0 to S - 1, the batch size B, and what a token must not see
    ``[B, 1, S, S]`` bool, or None if that is just what follows it.

    Outputs: cos and sin for queries ``[B, S, N, D]``, those for keys ``[B, S, K, D]``, and the score bias
    ``[B, N, S, S]``.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.n_kv_heads = config.num_heads, config.n_kv_heads
        self.softmax_dtype = config.softmax_compute_type
        self.masked_score = _masked_score(self.softmax_dtype)
        self.cast = P.Cast()

    def construct(self, cos, sin, batch_size, masked):
        length, head_dim = cos.shape
        queries = (batch_size, length, self.num_heads, head_dim)
        keys = (batch_size, length, self.n_kv_heads, head_dim)
        cos, sin = cos.reshape(length, 1, head_dim), sin.reshape(length, 1, head_dim)
        if masked is None:
            masked = ops.triu(ops.ones((length, length), self.softmax_dtype), 1)
        bias = self.cast(masked, self.softmax_dtype) * self.masked_score
        return (
            (ops.broadcast_to(cos, queries), ops.broadcast_to(sin, queries)),
            (ops.broadcast_to(cos, keys), ops.broadcast_to(sin, keys)),
            ops.broadcast_to(bias, (batch_size, self.num_heads, length, length)),
        )


class PagedInputsReference(nn.Cell):
    """What attention with a paged cache needs besides its operands, made once for all layers.

    The caches are ``[K * slots, D]``, head after head: the one layout in which a CPU writes tokens in
    place and reads a head's keys as a matrix. They have one block more than ``num_blocks``, where padding
    (slot -1) is written.

    Inputs: ``positions`` ``[T]`` of the tokens in their sequences, ``lengths`` ``[B]``, ``block_tables``
    ``[B, M]`` (-1 where a sequence has no block), ``slots`` ``[T]`` (-1: do not write), all int32.

    Outputs of ``prefill``: rows to write ``[T, K]``, None, score bias ``[1, 1, T, T]``; of ``decode``
    (T = B): rows to write, rows to read ``[K, B, L]``, score bias ``[1, B, 1, L]``, L = M * block_size.
    """

    def __init__(self, config, parts: int = 1):
        super().__init__()
        self.block_size = config.block_size
        self.spare_slot = config.num_blocks * config.block_size
        num_slots = self.spare_slot + config.block_size
        self.first_rows = Tensor(np.arange(config.n_kv_heads // parts, dtype=np.int32) * num_slots)
        self.offsets = Tensor(np.arange(config.block_size, dtype=np.int32))
        self.softmax_dtype = config.softmax_compute_type
        self.masked_score = _masked_score(self.softmax_dtype)
        self.select = P.Select()
        self.cumsum = P.CumSum()
        self.cast = P.Cast()

    def _rows_to_write(self, slots):
        slots = self.select(slots < 0, ops.full_like(slots, self.spare_slot), slots)
        return slots.reshape(-1, 1) + self.first_rows

    def _bias(self, masked):
        return self.cast(masked, self.softmax_dtype) * self.masked_score

    def prefill(self, positions, lengths, block_tables, slots):
        """A token sees those of its own sequence up to itself."""
        index = self.cumsum(ops.ones_like(positions), 0) - 1
        row, column = index.reshape(-1, 1), index.reshape(1, -1)
        start = (index - positions).reshape(-1, 1)
        masked = ops.logical_or(column > row, column < start)
        return self._rows_to_write(slots), None, self._bias(masked).reshape(1, 1, *masked.shape)

    def decode(self, positions, lengths, block_tables, slots):
        """A sequence sees its first ``lengths`` cached tokens."""
        batch = block_tables.shape[0]
        first = ops.maximum(block_tables, 0) * self.block_size
        rows = (first.reshape(batch, -1, 1) + self.offsets).reshape(1, batch, -1)
        index = self.cumsum(ops.ones_like(rows), 2) - 1
        masked = index >= lengths.reshape(1, -1, 1)
        rows = rows + self.first_rows.reshape(-1, 1, 1)
        return self._rows_to_write(slots), rows, self._bias(masked).reshape(1, batch, 1, -1)


class PagedAttentionReference(nn.Cell):
    """Attention with a paged cache of keys and values, by plain operators.

    Holds ``key_cache`` and ``value_cache``, laid out as PagedInputsReference says. Queries and result
    are ``[T, N*D]``, keys and values ``[T, K*D]``.
    """

    def __init__(self, config, parts: int = 1):
        super().__init__()
        self.n_kv_heads, self.head_dim = config.n_kv_heads // parts, config.head_dim
        self.group = config.num_heads // config.n_kv_heads
        shape = (self.n_kv_heads * (config.num_blocks + 1) * config.block_size, config.head_dim)
        self.key_cache = cache_parameter("key_cache", shape, config.compute_dtype)
        self.value_cache = cache_parameter("value_cache", shape, config.compute_dtype)
        self.write_key = P.ScatterUpdate()
        self.write_value = P.ScatterUpdate()
        self.gather = P.Gather()
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()
        self.attend = GroupedAttention(config.head_dim, config.softmax_compute_type)

    def _write(self, key, value, rows):
        shape = (-1, self.n_kv_heads, self.head_dim)
        keys = self.write_key(self.key_cache, rows, self.reshape(key, shape))
        values = self.write_value(self.value_cache, rows, self.reshape(value, shape))
        return keys, values

    def _heads_first(self, x):
        """``[T, n*D]`` as ``[1, n, T, D]``."""
        heads = self.reshape(x, (1, -1, x.shape[-1] // self.head_dim, self.head_dim))
        return self.transpose(heads, (0, 2, 1, 3))

    def prefill(self, query, key, value, inputs, lengths):
        """Write keys and values, and attend among the tokens given."""
        rows, _, bias = inputs
        query = ops.depend(query, self._write(key, value, rows))
        out = self.attend(self._heads_first(query), self._heads_first(key), self._heads_first(value), bias)
        return self.reshape(self.transpose(out, (0, 2, 1, 3)), query.shape)

    def decode(self, query, key, value, inputs, lengths):
        """Write one key and value for each sequence, and attend to all it has in the cache."""
        rows, cached, bias = inputs
        keys, values = self._write(key, value, rows)
        shape = (-1, self.n_kv_heads, self.group, self.head_dim)
        heads = self.transpose(self.reshape(query, shape), (1, 0, 2, 3))
        out = self.attend(heads, self.gather(keys, cached, 0), self.gather(values, cached, 0), bias)
        return self.reshape(self.transpose(out, (1, 0, 2, 3)), query.shape)


class CrossEntropyReference(nn.Cell):
    """Cross entropy of ``[T, V]`` float32 logits and ``[T]`` labels, over the tokens whose mask is 1.

    Returns its sum ``[1]`` and the number of tokens ``[1]``, a trifle above 0 if there are none.
    MindFormers' own loss, which is used on Ascend because it can be split over a vocabulary's ranks, does the
    same in ten passes over the logits; this one makes two.
    """

    def __init__(self):
        super().__init__()
        self.log_softmax = P.LogSoftmax(-1)
        self.pick = P.GatherD()
        self.sum = P.ReduceSum()

    def construct(self, logits, labels, mask):
        picked = self.pick(self.log_softmax(logits), 1, ops.maximum(labels, 0).reshape(-1, 1))
        numerator = self.sum(-picked.reshape(-1) * mask).reshape(1)
        return numerator, self.sum(mask).reshape(1) + 1e-8


def _masked_score(dtype) -> float:
    """Added to a masked score, whose softmax is 0 then; finite, since the others get 0 times it."""
    return -6.0e4 if dtype == ms.float16 else -3.0e38


def cache_parameter(name, shape, dtype) -> Parameter:
    """A zeroed cache of keys or values, which is no weight."""
    return Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=False)
