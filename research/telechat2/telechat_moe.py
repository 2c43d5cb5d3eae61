"""The mixture of experts that takes the feed-forward block's place: router, experts, auxiliary loss.

Parameters are stacked as in the published checkpoints: ``router.dense.weight`` [E, H], ``ffn.w1.weight`` and
``ffn.w3.weight`` [E, F, H], ``ffn.w2.weight`` [E, H, F], ``ffn.w2.bias`` [1, E, 1, H].
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2 import telechat_ops
from research.telechat2.telechat_parallel import ProcessMean

ROUTER_SIGMA = 0.01  # spec 1.2: the router starts wider than the other linears


class _Stack(nn.Cell):
    """One linear of every expert: ``weight`` [E, out, in], and perhaps ``bias`` [1, E, 1, out]."""

    def __init__(self, out_channels, in_channels, config, has_bias=False):
        super().__init__()
        shape = (config.moe.num_experts, out_channels, in_channels)
        self.weight = Parameter(
            initializer(Normal(config.sigma, config.mean), shape, config.param_init_type), name="weight"
        )
        if has_bias:
            shape = (1, config.moe.num_experts, 1, out_channels)
            self.bias = Parameter(initializer("zeros", shape, config.param_init_type), name="bias")


class TelechatExperts(nn.Cell):
    """The parameters of all experts of a layer.

    Prediction wants the weights turned, ``[E, in, out]``: ``turn`` does that after loading.
    """

    def __init__(self, config):
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.w1 = _Stack(width, hidden, config)
        self.w3 = _Stack(width, hidden, config)
        self.w2 = _Stack(hidden, width, config, has_bias=True)
        self.turned = False

    def turn(self):
        """Turn the weights, stack by stack; once."""
        if not self.turned:
            for stack in (self.w1, self.w3, self.w2):
                stack.weight.set_data(ops.transpose(stack.weight, (0, 2, 1)), slice_shape=True)
            self.turned = True


class RouterLinear(nn.Cell):
    """``x @ weight^T`` in float32, ``[T, H]`` to ``[T, E]``."""

    def __init__(self, config):
        super().__init__()
        self.weight = Parameter(
            initializer(
                Normal(ROUTER_SIGMA), (config.moe.num_experts, config.hidden_size), config.param_init_type
            ),
            name="weight",
        )
        self.matmul = P.MatMul(transpose_b=True)
        self.cast = P.Cast()

    def construct(self, x):
        return self.matmul(self.cast(x, ms.float32), self.cast(self.weight, ms.float32))


class Likeliest(nn.Cell):
    """The k likeliest experts of each token, the likeliest first and the lower number first of equal ones.

    TopK takes any of equal values on a CPU. Here of each pair of experts the one with the higher number goes
    ahead if it is likelier, and an expert's place is its number and what such pairs add to it. Places remain
    those of a permutation where probabilities are not numbers: a step that overflowed ends without a crash.

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


class TelechatRouter(nn.Cell):
    """Sends each token to its k likeliest experts; of equally likely ones to those with the lower numbers.

    Input: x ``[T, H]``.

    Outputs: probabilities ``[T, E]`` float32 (softmax over all experts), experts ``[T, k]`` int32, and gates
    ``[T, k]`` float32, the chosen probabilities divided by their sum + 1e-9.
    """

    def __init__(self, config):
        super().__init__()
        self.top_k, self.num_experts = config.moe.top_k, config.moe.num_experts
        self.dense = RouterLinear(config)
        self.softmax = P.Softmax(-1)
        self.likeliest = Likeliest(self.num_experts, self.top_k)
        self.matmul = P.BatchMatMul()
        self.sum = P.ReduceSum(keep_dims=True)
        self.add = P.Add()
        self.div = P.Div()
        self.reshape = P.Reshape()

    def construct(self, x):
        probabilities = self.softmax(self.dense(x))
        experts, chosen = self.likeliest(ops.stop_gradient(probabilities))
        # A product with one-hot rows picks them: its gradient adds nothing up in uncertain order.
        picked = self.matmul(chosen, self.reshape(probabilities, (-1, self.num_experts, 1)))
        picked = self.reshape(picked, (-1, self.top_k))
        return probabilities, experts, self.div(picked, self.add(self.sum(picked, -1), 1e-9))


class ExpertLoad(nn.Cell):
    """Each expert's share ``[E]`` of all choices, float32, over the tokens of all devices.

    Inputs: experts ``[T, k]`` int32; kept ``[T, k]``, 0 for choices not to count, or None to count all.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.experts = Tensor(np.arange(num_experts, dtype=np.int32))
        self.mean_over_processes = ProcessMean()
        self.equal = P.Equal()
        self.mean = P.ReduceMean()
        self.mul = P.Mul()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, experts, kept):
        chosen = self.cast(self.equal(self.reshape(experts, (-1, 1)), self.experts), ms.float32)
        if kept is not None:
            chosen = self.mul(chosen, self.cast(self.reshape(kept, (-1, 1)), ms.float32))
        return ops.stop_gradient(self.mean_over_processes(self.mean(chosen, 0)))


class BalanceLoss(nn.Cell):
    """Auxiliary loss ``[1]``, ``factor * E * sum over experts of f * P`` (Fedus et al. 2021, equation 4).

    f is an expert's share of all choices, P its mean probability, both over the tokens of all devices; the
    gradient flows through P. Inputs: probabilities ``[T, E]``, f ``[E]``.
    """

    def __init__(self, num_experts: int, factor: float):
        super().__init__()
        self.scale = factor * num_experts
        self.mean_over_processes = ProcessMean()
        self.mean = P.ReduceMean()
        self.sum = P.ReduceSum()
        self.mul = P.Mul()
        self.reshape = P.Reshape()

    def construct(self, probabilities, load):
        probability = self.mean_over_processes(self.mean(probabilities, 0))
        return self.reshape(self.mul(self.sum(self.mul(load, probability)), self.scale), (1,))


class TelechatMoE(nn.Cell):
    """The mixture of experts on ``[T, H]``: in training by capacity or dropless, otherwise always dropless.

    Returns ``[T, H]`` in ``compute_dtype`` and the auxiliary loss ``[1]``. After a training step
    ``expert_load`` [2, E] holds, of all choices, the share that was sent to each expert and the share that it
    took; it is no weight.
    """

    def __init__(self, config):
        super().__init__()
        moe = config.moe
        self.router = TelechatRouter(config)
        self.ffn = TelechatExperts(config)
        self.with_capacity = moe.capacity_factor > 0
        if self.with_capacity:
            self.capacity_experts = telechat_ops.capacity_experts(config)
        self.dropless_experts = telechat_ops.dropless_experts(config)
        self.load = ExpertLoad(moe.num_experts)
        self.balance_loss = BalanceLoss(moe.num_experts, moe.balance_factor)
        # MindFormers leaves parameters of this name out of the checkpoints it saves.
        self.expert_load = Parameter(
            initializer("zeros", (2, moe.num_experts), ms.float32), name="expert_load", requires_grad=False
        )
        self.keep = P.Assign()
        self.stack = P.Stack()
        self.dtype = config.compute_dtype
        self.cast = P.Cast()

    def construct(self, x):
        probabilities, experts, gates = self.router(x)
        load = self.load(experts, None)
        loss = self.balance_loss(probabilities, load)
        operands = (
            self.cast(x, self.dtype),
            experts,
            self.cast(gates, self.dtype),
            self.cast(self.ffn.w1.weight, self.dtype),
            self.cast(self.ffn.w3.weight, self.dtype),
            self.cast(self.ffn.w2.weight, self.dtype),
            self.cast(self.ffn.w2.bias, self.dtype),
        )
        if not self.training:
            return self.dropless_experts(*operands), loss
        taken = load
        if self.with_capacity:
            y, kept = self.capacity_experts(*operands)
            taken = self.load(experts, kept)
        else:
            y = self.dropless_experts(*operands)
        self.keep(self.expert_load, self.stack((load, taken)))
        return y, loss
