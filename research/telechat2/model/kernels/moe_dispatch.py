"""Tokens to their experts and back, by plain operators: every expert's rows padded to one number, C.

The rows of all experts form one block ``[E * C, H]``, expert after expert. With a capacity, C is that number
and choices beyond it are dropped; without one, C is the load of the busiest expert, and nothing is dropped.
T: tokens, H: channels, E: experts, k: experts of each token, F: width of an expert.

Primitives only: MindSpore loses functional calls beside cells that bring their own gradient ("The func graph
is empty").
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import constexpr
from mindspore.ops import operations as P  # noqa: N812


class TopKReference(nn.Cell):
    """The k most probable experts of each token, in falling order, the lower number first of equal ones.

    By comparison of pairs, since TopK takes any of equal values on a CPU. Of each pair of experts the one
    with the higher number moves ahead if it is more probable; an expert's place is its number plus the moves
    of its pairs. The places remain a permutation where probabilities are NaN: a step that overflowed does not
    crash.

    Input: probabilities ``[T, E]``. Outputs: experts ``[T, k]`` int32, and the same one-hot, ``[T, k, E]``
    float32.
    """

    def __init__(self, num_experts: int, top_k: int):
        super().__init__()
        self.num_experts = num_experts
        lower, higher = np.triu_indices(num_experts, 1)
        self.lower, self.higher = Tensor(lower.astype(np.int32)), Tensor(higher.astype(np.int32))
        pairs = np.arange(len(lower))
        moves = np.zeros((len(lower), num_experts), np.float32)
        moves[pairs, lower], moves[pairs, higher] = 1, -1
        self.moves = Tensor(moves)
        self.numbers = Tensor(np.arange(num_experts, dtype=np.float32))
        self.places = Tensor(np.arange(top_k, dtype=np.float32).reshape(top_k, 1))
        self.gather = P.Gather()
        self.less = P.Less()
        self.equal = P.Equal()
        self.matmul = P.MatMul()
        self.add = P.Add()
        self.mul = P.Mul()
        self.sum = P.ReduceSum()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, probabilities):
        swapped = self.less(
            self.gather(probabilities, self.lower, 1), self.gather(probabilities, self.higher, 1)
        )
        places = self.add(self.matmul(self.cast(swapped, ms.float32), self.moves), self.numbers)
        chosen = self.equal(self.reshape(places, (-1, 1, self.num_experts)), self.places)
        chosen = self.cast(chosen, ms.float32)
        return self.cast(self.sum(self.mul(chosen, self.numbers), -1), ms.int32), chosen


class ExpertRows(nn.Cell):
    """Finds a row of the block for each choice of each token: an expert's i-th choice gets its i-th row.

    Choices are counted token-major (all choices of the first token, then those of the second) or k-major (the
    first choices of all tokens, then the second ones). All arithmetic is int32.

    Inputs: experts ``[T, k]`` int32, and the capacity, an int, or None.

    Outputs, all int32:
        - rows ``[T, k]``: the row of each choice; the last row of the block where it is dropped.
        - kept ``[T, k]``: 1, or 0 where the choice is dropped.
        - choices ``[E * C]``: the choice ``t * k + j`` in each row, -1 where the row is empty.
    """

    def __init__(self, num_experts: int, token_major: bool):
        super().__init__()
        self.num_experts, self.token_major = num_experts, token_major
        self.experts = Tensor(np.arange(num_experts, dtype=np.int32))
        self.zero, self.one, self.none = (Tensor(value, ms.int32) for value in (0, 1, -1))
        self.equal = P.Equal()
        self.less = P.Less()
        self.cumsum = P.CumSum()
        self.sum = P.ReduceSum()
        self.max = P.ReduceMax()
        self.mul = P.Mul()
        self.add = P.Add()
        self.sub = P.Sub()
        self.minimum = P.Minimum()
        self.select = P.Select()
        self.range = P.Range()
        self.fill = P.FillV2()
        self.ones = P.OnesLike()
        self.scatter = P.TensorScatterUpdate()
        self.transpose = P.Transpose()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, experts, capacity):
        order = experts if self.token_major else self.transpose(experts, (1, 0))
        flat = self.reshape(order, (-1,))
        chosen = self.cast(self.equal(self.reshape(flat, (-1, 1)), self.experts), ms.int32)
        earlier = self.sub(self.sum(self.mul(self.cumsum(chosen, 0), chosen), 1), 1)
        if capacity is None:
            size = self.max(self.sum(chosen, 0))
            block = self.mul(size, self.num_experts)
            indices = self.range(self.zero, block, self.one)
            empty = self.sub(self.mul(self.cast(indices, ms.int32), 0), 1)
            rows = self._in_order(self.add(self.mul(flat, size), earlier), experts)
            return rows, self.ones(rows), self._choices(empty, rows)
        block = self.num_experts * capacity
        kept = self.less(earlier, capacity)
        rows = self.add(self.mul(flat, capacity), earlier)
        rows = self._in_order(self.select(kept, rows, self.mul(self.ones(rows), block)), experts)
        # Dropped choices meet in one more row, which is cut off.
        choices = self._choices(self.fill((block + 1,), self.none), rows)[:block]
        kept = self._in_order(self.cast(kept, ms.int32), experts)
        return self.minimum(rows, block - 1), kept, choices

    def _in_order(self, values, experts):
        """Values of the counted choices as ``[T, k]``."""
        if self.token_major:
            return self.reshape(values, experts.shape)
        return self.transpose(self.reshape(values, (experts.shape[1], -1)), (1, 0))

    def _choices(self, empty, rows):
        rows = self.reshape(rows, (-1, 1))
        number = self.sub(self.cumsum(self.ones(rows), 0), 1)
        return self.scatter(empty, rows, self.reshape(number, (-1,)))


class WeightedRows(nn.Cell):
    """``y[t] = sum over j of weights[t, j] * block[rows[t, j]]``: block ``[E * C, H]``, y ``[T, H]``.

    One batched product on a CPU, which is slower at sums over an axis in the middle.
    """

    def __init__(self):
        super().__init__()
        self.gather = P.Gather()
        self.matmul = P.BatchMatMul()
        self.reshape = P.Reshape()

    def construct(self, block, weights, rows):
        top_k, hidden = rows.shape[1], block.shape[1]
        chosen = self.gather(block, rows, 0)
        return self.reshape(self.matmul(self.reshape(weights, (-1, 1, top_k)), chosen), (-1, hidden))


class Permute(nn.Cell):
    """Tokens ``[T, H]`` to the block ``[E * C, H]``, zeros in empty rows.

    The gradient gathers as well: that of a token is the sum of those in its rows. MindSpore's own gradient of
    Gather adds up rows in no certain order.
    """

    def __init__(self):
        super().__init__()
        self.gather = P.Gather()
        self.concat = P.Concat(0)
        self.weighted_rows = WeightedRows()
        self.floor_div = P.FloorDiv()
        self.add = P.Add()
        self.zeros = P.ZerosLike()
        self.cast = P.Cast()

    def construct(self, x, rows, kept, choices):
        padded = self.concat((self.zeros(x[:1]), x))
        return self.gather(padded, self.add(self.floor_div(choices, rows.shape[1]), 1), 0)

    def bprop(self, x, rows, kept, choices, out, dout):
        """Gradient of the tokens."""
        dx = self.weighted_rows(dout, self.cast(kept, dout.dtype), rows)
        return dx, self.zeros(rows), self.zeros(kept), self.zeros(choices)


class Unpermute(nn.Cell):
    """The block ``[E * C, H]`` to tokens ``[T, H]``: the sum of each token's rows times its gates ``[T, k]``.

    With row r holding choice j of token t, the gradients are ``dblock[r] = gates[t, j] * dy[t]`` and
    ``dgates[t, j] = dy[t] · block[r]``.
    """

    def __init__(self):
        super().__init__()
        self.gather = P.Gather()
        self.weighted_rows = WeightedRows()
        self.matmul = P.BatchMatMul()
        self.mul = P.Mul()
        self.maximum = P.Maximum()
        self.floor_div = P.FloorDiv()
        self.zeros = P.ZerosLike()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, block, gates, rows, kept, choices):
        return self.weighted_rows(block, self.mul(gates, self.cast(kept, gates.dtype)), rows)

    def bprop(self, block, gates, rows, kept, choices, out, dout):
        """Gradients of block and gates."""
        filled = self.cast(choices >= 0, gates.dtype)
        gate = self.mul(self.gather(self.reshape(gates, (-1,)), self.maximum(choices, 0), 0), filled)
        token = self.maximum(self.floor_div(choices, rows.shape[1]), 0)
        dblock = self.mul(self.gather(dout, token, 0), self.reshape(gate, (-1, 1)))
        chosen = self.gather(block, rows, 0)
        dgates = self.matmul(chosen, self.reshape(dout, (-1, dout.shape[1], 1)))
        dgates = self.mul(self.reshape(dgates, gates.shape), self.cast(kept, gates.dtype))
        return dblock, dgates, self.zeros(rows), self.zeros(kept), self.zeros(choices)


class OwnExperts(nn.Cell):
    """One device has all experts: their rows stay where they are. ExpertExchange is the same for many."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.reshape = P.Reshape()

    def forth(self, block):
        """The tokens' rows ``[E * C, H]`` as ``[E, C, H]``."""
        return self.reshape(block, (self.num_experts, -1, block.shape[1]))

    def back(self, rows):
        """The inverse."""
        return self.reshape(rows, (-1, rows.shape[2]))

    def add_up(self, y):
        """The outputs ``[T, H]``, which are whole."""
        return y


class BatchedExperts(nn.Cell):
    """The outputs of the experts for their tokens, as batched products over the block.

    Args:
        settings: MoESettings.
        swiglu: kernel ``(gate [n, F], up [n, F]) -> [n, F]``.
        transposed: whether the weights are.

    Inputs: x ``[T, H]``, experts ``[T, k]`` int32, gates ``[T, k]``, w1, w3 ``[E, F, H]``, w2
    ``[E, H, F]`` (where ``transposed``: ``[E, H, F]`` and ``[E, F, H]``), bias ``[1, E, 1, H]``, all of x's
    dtype but the experts; the capacity, an int, or None to drop nothing.

    Outputs: ``y[t] = sum over j of gates[t, j] * (w2 swiglu(w1 x[t], w3 x[t]) + bias)`` of expert
    ``experts[t, j]``, ``[T, H]``; and kept ``[T, k]`` int32, 0 where a choice was dropped.
    """

    def __init__(self, settings, swiglu: nn.Cell, transposed: bool = False):
        super().__init__()
        self.expert_rows = ExpertRows(settings.num_experts, settings.token_major)
        self.permute = Permute()
        self.unpermute = Unpermute()
        self.exchange = OwnExperts(settings.num_experts)
        self.gated_bias = GatedBias(settings.num_experts)
        self.swiglu = swiglu
        self.batched_matmul = P.BatchMatMul(transpose_b=not transposed)
        self.width_axis = 2 if transposed else 1
        self.add = P.Add()
        self.reshape = P.Reshape()

    def outputs(self, x, experts, gates, w1, w3, w2, bias, capacity):
        """See the class."""
        num_experts, width = w1.shape[0], w1.shape[self.width_axis]
        rows, kept, choices = self.expert_rows(experts, capacity)
        block = self.exchange.forth(self.permute(x, rows, kept, choices))
        gate = self.reshape(self.batched_matmul(block, w1), (-1, width))
        up = self.reshape(self.batched_matmul(block, w3), (-1, width))
        out = self.reshape(self.swiglu(gate, up), (num_experts, -1, width))
        block = self.exchange.back(self.batched_matmul(out, w2))
        y = self.exchange.add_up(self.unpermute(block, gates, rows, kept, choices))
        return self.add(y, self.gated_bias(experts, gates, kept, bias)), kept


class GatedBias(nn.Cell):
    """``sum over j of gates[t, j] * bias[experts[t, j]]``, as the product of ``[T, E]`` and ``[E, H]``."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.experts = Tensor(np.arange(num_experts, dtype=np.int32))
        self.equal = P.Equal()
        self.mul = P.Mul()
        self.batched_matmul = P.BatchMatMul()
        self.matmul = P.MatMul()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, experts, gates, kept, bias):
        num_experts, hidden, top_k = bias.shape[1], bias.shape[3], experts.shape[1]
        chosen = self.cast(self.equal(self.reshape(experts, (-1, top_k, 1)), self.experts), gates.dtype)
        gates = self.reshape(self.mul(gates, self.cast(kept, gates.dtype)), (-1, 1, top_k))
        shares = self.reshape(self.batched_matmul(gates, chosen), (-1, num_experts))
        return self.matmul(shares, self.reshape(bias, (num_experts, hidden)))


class CapacityExperts(BatchedExperts):
    """BatchedExperts with the capacity that MoESettings give for the number of tokens."""

    def __init__(self, settings, swiglu: nn.Cell):
        super().__init__(settings, swiglu)
        self.capacity = constexpr(settings.capacity)

    def construct(self, x, experts, gates, w1, w3, w2, bias):
        return self.outputs(x, experts, gates, w1, w3, w2, bias, self.capacity(x.shape[0]))


class DroplessExpertsReference(BatchedExperts):
    """BatchedExperts that drop nothing; returns y alone."""

    def construct(self, x, experts, gates, w1, w3, w2, bias):
        return self.outputs(x, experts, gates, w1, w3, w2, bias, None)[0]
