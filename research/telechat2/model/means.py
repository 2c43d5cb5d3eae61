"""Means over the tokens of all processes."""

import mindspore as ms
from mindspore import nn, ops


class _AcrossProcesses(nn.Cell):
    """Whether processes share a step, each with its own records, and how to add up what they have.

    The value of what they add up is everyone's, the gradient that of the own part: the processes' gradients
    are added up again by the optimizer.
    """

    def __init__(self):
        super().__init__()
        self.data_parallel = ms.get_auto_parallel_context("parallel_mode") == "data_parallel"
        if self.data_parallel:
            self.all_reduce = ops.AllReduce()
            self.processes = float(ms.communication.get_group_size())
            # Where the processes average their gradients instead of adding them, the parts must be larger.
            mean = ms.get_auto_parallel_context("gradients_mean")
            self.gradient_scale = self.processes if mean else 1.0

    def add_up(self, part):
        """The sum of all processes' parts."""
        value = ops.stop_gradient(self.all_reduce(ops.stop_gradient(part)))
        part = part * self.gradient_scale
        return part + (value - ops.stop_gradient(part))


class GlobalMean(_AcrossProcesses):
    """Sum of losses over number of tokens, ``[1]`` each, to the mean over all processes ``[1]``.

    Each process divides its own sum by the number of tokens of all, so that the sum of the processes'
    gradients is the gradient of the global mean even where they hold different numbers of tokens.
    """

    def construct(self, total, count):
        if not self.data_parallel:
            return total / count
        return self.add_up(total / ops.stop_gradient(self.all_reduce(count)))


class ProcessMean(_AcrossProcesses):
    """The mean of the processes' tensors, where they hold equally many tokens."""

    def construct(self, part):
        return self.add_up(part / self.processes) if self.data_parallel else part
