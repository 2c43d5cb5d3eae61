"""Which experts a token is sent to, and with what weight."""

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import operations as P  # noqa: N812


class Router(nn.Cell):
    """Sends each token to its k most probable experts; for equal probabilities see the kernels' ``top_k``.

    Inputs: x ``[T, H]`` and the weight ``[E, H]``; all is computed in float32.

    Outputs: probabilities ``[T, E]`` (softmax over all experts), experts ``[T, k]`` int32, the same one-hot
    ``[T, k, E]``, and gates ``[T, k]``, the chosen probabilities divided by their sum + 1e-9.
    """

    def __init__(self, settings, kernels):
        super().__init__()
        self.top_k, self.num_experts = settings.top_k, settings.num_experts
        self.linear = P.MatMul(transpose_b=True)
        self.softmax = P.Softmax(-1)
        self.choose = kernels.top_k(self.num_experts, self.top_k)
        self.matmul = P.BatchMatMul()
        self.sum = P.ReduceSum(keep_dims=True)
        self.add = P.Add()
        self.div = P.Div()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, x, weight):
        logits = self.linear(self.cast(x, ms.float32), self.cast(weight, ms.float32))
        probabilities = self.softmax(logits)
        experts, chosen = self.choose(ops.stop_gradient(probabilities))
        # A product with one-hot rows picks them: its gradient adds nothing up in uncertain order.
        picked = self.matmul(chosen, self.reshape(probabilities, (-1, self.num_experts, 1)))
        picked = self.reshape(picked, (-1, self.top_k))
        gates = self.div(picked, self.add(self.sum(picked, -1), 1e-9))
        return probabilities, experts, chosen, gates
