"""Which experts a token is sent to, and with what weight."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P  # noqa: N812


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


class Router(nn.Cell):
    """Sends each token to its k likeliest experts; of equally likely ones to those with the lower numbers.

    Inputs: x ``[T, H]`` and the weight ``[E, H]``; all is computed in float32.

    Outputs: probabilities ``[T, E]`` (softmax over all experts), experts ``[T, k]`` int32, the same one-hot
    ``[T, k, E]``, and gates ``[T, k]``, the chosen probabilities divided by their sum + 1e-9.
    """

    def __init__(self, settings):
        super().__init__()
        self.top_k, self.num_experts = settings.top_k, settings.num_experts
        self.linear = P.MatMul(transpose_b=True)
        self.softmax = P.Softmax(-1)
        self.likeliest = Likeliest(self.num_experts, self.top_k)
        self.matmul = P.BatchMatMul()
        self.sum = P.ReduceSum(keep_dims=True)
        self.add = P.Add()
        self.div = P.Div()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, x, weight):
        logits = self.linear(self.cast(x, ms.float32), self.cast(weight, ms.float32))
        probabilities = self.softmax(logits)
        experts, chosen = self.likeliest(ops.stop_gradient(probabilities))
        # A product with one-hot rows picks them: its gradient adds nothing up in uncertain order.
        picked = self.matmul(chosen, self.reshape(probabilities, (-1, self.num_experts, 1)))
        picked = self.reshape(picked, (-1, self.top_k))
        gates = self.div(picked, self.add(self.sum(picked, -1), 1e-9))
        return probabilities, experts, chosen, gates
