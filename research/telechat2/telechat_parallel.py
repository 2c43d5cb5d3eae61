"""What a parallel plan adds to the model. A plan changes no number: the loss is that of one device.

Data parallelism is all there is so far: every process has its own records, and the processes add up their
gradients.
"""

import mindspore as ms
from mindspore import nn, ops


class GlobalMean(nn.Cell):
    """Sum of losses over number of tokens, ``[1]`` each, to the mean over all processes ``[1]``.

    Each process divides its own sum by the number of tokens of all, so that the sum of the processes'
    gradients is the gradient of the global mean even where they hold different numbers of tokens. The value
    returned is the global mean; the gradient is that of the own part.
    """

    def __init__(self):
        super().__init__()
        self.data_parallel = ms.get_auto_parallel_context("parallel_mode") == "data_parallel"
        if self.data_parallel:
            self.all_reduce = ops.AllReduce()
            # Where the processes average their gradients instead of adding them, the parts must be larger.
            mean = ms.get_auto_parallel_context("gradients_mean")
            self.gradient_scale = float(ms.communication.get_group_size()) if mean else 1.0

    def construct(self, total, count):
        if not self.data_parallel:
            return total / count
        count = ops.stop_gradient(self.all_reduce(count))
        part = total / count
        value = ops.stop_gradient(self.all_reduce(ops.stop_gradient(part)))
        part = part * self.gradient_scale
        return part + (value - ops.stop_gradient(part))
