"""The mixture of experts, which takes the place of the feed-forward block.

Parameters are stacked as in the published checkpoints: ``router.dense.weight`` [E, H], ``ffn.w1.weight`` and
``ffn.w3.weight`` [E, F, H], ``ffn.w2.weight`` [E, H, F], ``ffn.w2.bias`` [1, E, 1, H].
"""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.model.means import ProcessMean
from research.telechat2.model.moe_router import Router

ROUTER_SIGMA = 0.01  # spec 1.2: the router starts wider than the other linears


class _Weights(nn.Cell):
    """A ``weight`` of normal initial values, and perhaps a ``bias`` of zeros."""

    def __init__(self, shape, sigma, config, bias_shape=None):
        super().__init__()
        self.weight = Parameter(
            initializer(Normal(sigma, config.mean), shape, config.param_init_type), name="weight"
        )
        if bias_shape:
            self.bias = Parameter(initializer("zeros", bias_shape, config.param_init_type), name="bias")


class RouterWeights(nn.Cell):
    """The router's parameter, ``dense.weight`` [E, H]."""

    def __init__(self, config):
        super().__init__()
        self.dense = _Weights((config.moe.num_experts, config.hidden_size), ROUTER_SIGMA, config)


class ExpertWeights(nn.Cell):
    """The parameters of all experts of a layer.

    The kernels of prediction take the weights as ``[E, in, out]``: ``transpose`` does that after loading.
    """

    def __init__(self, config):
        super().__init__()
        experts, hidden = config.moe.num_experts, config.hidden_size
        width = config.intermediate_size
        self.w1 = _Weights((experts, width, hidden), config.sigma, config)
        self.w3 = _Weights((experts, width, hidden), config.sigma, config)
        self.w2 = _Weights((experts, hidden, width), config.sigma, config, bias_shape=(1, experts, 1, hidden))
        self.transposed = False

    def transpose(self):
        """Transpose the weights to ``[E, in, out]``, stack by stack; once."""
        if not self.transposed:
            for stack in (self.w1, self.w3, self.w2):
                stack.weight.set_data(ops.transpose(stack.weight, (0, 2, 1)), slice_shape=True)
            self.transposed = True


class ExpertBlock(nn.Cell):
    """Router and experts on one device, and the statistics of the routing.

    Args:
        config: TelechatConfig.
        kernels: those of the model.
        experts: the kernel: CapacityExperts also returns which choices it kept, dropless experts do not.
        capacity: whether it is CapacityExperts.

    Inputs: x ``[T, H]``; the router's weight, w1, w3, w2 and bias of the experts.

    Outputs: y ``[T, H]`` in ``compute_dtype``, and shares ``[1, 3, E]`` float32, of these T tokens: each
    expert's mean probability, and of all choices the share that was sent to it and the share that it took.
    """

    def __init__(self, config, kernels, experts: nn.Cell, capacity: bool):
        super().__init__()
        self.router = Router(config.moe, kernels)
        self.experts, self.capacity = experts, capacity
        self.num_experts, self.dtype = config.moe.num_experts, config.compute_dtype
        self.mean = P.ReduceMean()
        self.mul = P.Mul()
        self.stack = P.Stack()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, x, router, w1, w3, w2, bias):
        probabilities, experts, chosen, gates = self.router(x, router)
        x, gates = self.cast(x, self.dtype), self.cast(gates, self.dtype)
        sent = taken = self.mean(chosen, (0, 1))
        if self.capacity:
            y, kept = self.experts(x, experts, gates, w1, w3, w2, bias)
            kept = self.reshape(self.cast(kept, ms.float32), (-1, chosen.shape[1], 1))
            taken = self.mean(self.mul(chosen, kept), (0, 1))
        else:
            y = self.experts(x, experts, gates, w1, w3, w2, bias)
        shares = self.stack((self.mean(probabilities, 0), sent, taken))
        return y, self.reshape(shares, (1, 3, self.num_experts))


class TelechatMoE(nn.Cell):
    """The mixture of experts: in training with a capacity or dropless, otherwise always dropless.

    Input: x ``[T, H]``. Outputs: ``[T, H]`` in ``compute_dtype`` and the auxiliary loss ``[1]``,
    ``factor * E * sum over experts of f * P`` (Fedus et al. 2021, equation 4): f is an
    expert's share of all choices, P its mean probability, both over the tokens of all devices; the gradient
    flows through P.

    After a training step ``expert_load`` [2, E] holds, of all choices, the share that was sent to each expert
    and the share that it took; it is no weight.
    """

    def __init__(self, config, kernels):
        super().__init__()
        moe = config.moe
        self.router, self.ffn = RouterWeights(config), ExpertWeights(config)
        self.with_capacity = moe.capacity_factor > 0
        if self.with_capacity:
            self.capacity_block = ExpertBlock(config, kernels, kernels.capacity_experts(config), True)
        self.dropless_block = ExpertBlock(config, kernels, kernels.dropless_experts(config), False)
        self.balance_scale = moe.balance_factor * moe.num_experts
        self.mean_over_processes = ProcessMean()
        # MindFormers leaves this name out of checkpoint/rank_*; the section `checkpoint:` saves it.
        self.expert_load = Parameter(
            initializer("zeros", (2, moe.num_experts), ms.float32), name="expert_load", requires_grad=False
        )
        self.dtype = config.compute_dtype
        self.cast_w1, self.cast_w3, self.cast_w2, self.cast_bias = P.Cast(), P.Cast(), P.Cast(), P.Cast()
        self.mean_over_devices = P.ReduceMean()
        self.row, self.rows = P.StridedSlice(), P.StridedSlice()
        self.keep = P.Assign()
        self.sum = P.ReduceSum()
        self.mul, self.scale = P.Mul(), P.Mul()

    def construct(self, x):
        operands = (
            x,
            self.router.dense.weight,
            self.cast_w1(self.ffn.w1.weight, self.dtype),
            self.cast_w3(self.ffn.w3.weight, self.dtype),
            self.cast_w2(self.ffn.w2.weight, self.dtype),
            self.cast_bias(self.ffn.w2.bias, self.dtype),
        )
        if self.training and self.with_capacity:
            y, shares = self.capacity_block(*operands)
        else:
            y, shares = self.dropless_block(*operands)
        shares = self.mean_over_processes(self.mean_over_devices(shares, 0))
        experts = shares.shape[1]
        load = ops.stop_gradient(self.rows(shares, (1, 0), (3, experts), (1, 1)))
        if self.training:
            self.keep(self.expert_load, load)
        probability = self.row(shares, (0, 0), (1, experts), (1, 1))
        sent = self.row(load, (0, 0), (1, experts), (1, 1))
        loss = self.scale(self.sum(self.mul(probability, sent), 1), self.balance_scale)
        return y, loss
