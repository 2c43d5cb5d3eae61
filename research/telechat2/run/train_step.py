"""The training step."""

from mindspore import nn, ops

from research.telechat2.compat.library import LibraryTrainOneStepCell, is_cpu


class _AnyNotFinite(nn.Cell):
    """Whether any element of any gradient is infinite or not a number; a scalar bool tensor."""

    def __init__(self):
        super().__init__()
        self.isfinite = ops.IsFinite()
        self.all = ops.ReduceAll()
        self.logical_and = ops.LogicalAnd()
        self.logical_not = ops.LogicalNot()

    def construct(self, grads):
        finite = self.all(self.isfinite(grads[0]))
        for grad in grads[1:]:
            finite = self.logical_and(finite, self.all(self.isfinite(grad)))
        return self.logical_not(finite)


class MFTrainOneStepCell(LibraryTrainOneStepCell):
    """MindFormers' training step with an overflow check that exists on a CPU.

    On Ascend the inherited check runs. MindFormers takes every target but GPU and 910B for an NPU and falls
    through to ``NPUGetFloatStatusV2``, which a CPU does not have. In a run this class takes the place of
    MindFormers' class of the same name, so that a YAML written for NPUs trains on a CPU unchanged.
    """

    def __init__(self, network, optimizer, **kwargs):
        super().__init__(network, optimizer, **kwargs)
        self.on_cpu = is_cpu()
        self.any_not_finite = _AnyNotFinite()

    def get_overflow_status(self, status, compute_output):
        """A scalar bool tensor: whether this step's gradients overflowed."""
        if self.on_cpu:
            return self.any_not_finite(compute_output)
        return super().get_overflow_status(status, compute_output)
