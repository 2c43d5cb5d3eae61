"""TelechatPerplexity: loss and perplexity of evaluation data, by token."""

import math
from typing import ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from research.telechat2.telechat_compat import MindFormerModuleType, MindFormerRegister

_ROWS = 128  # logits taken to float64 at once: 128 x 131072 of them are 128 MB


@MindFormerRegister.register(MindFormerModuleType.METRIC)
class TelechatPerplexity(nn.Metric):
    """Sum of the losses of all trained tokens divided by their number, and the exponential of it.

    It does not depend on how records are batched, which the mean of batch means (MindFormers'
    PerplexityMetric) does where batches hold different numbers of trained tokens. In data parallel runs the
    tokens of all processes count.
    """

    latest: ClassVar[dict | None] = None  # what ``eval`` last returned: MindFormers only logs it

    def __init__(self):
        super().__init__()
        self.data_parallel = ms.get_auto_parallel_context("parallel_mode") == "data_parallel"
        self.clear()

    def clear(self):
        """Forget the tokens so far."""
        self.total, self.count = 0.0, 0

    def update(self, *inputs):
        """Add a batch: logits ``[B, S, V]``, tokens ``[B, S]``, and the mask ``[B, S]`` of trained tokens.

        The logits of a position are held against the token of the next.
        """
        logits, tokens, mask = (value.asnumpy() if isinstance(value, Tensor) else value for value in inputs)
        trained = mask[:, 1:].astype(bool)
        targets = tokens[:, 1:][trained]
        predictions = np.argwhere(trained)
        for start in range(0, len(targets), _ROWS):
            records, positions = predictions[start : start + _ROWS].T
            rows = logits[records, positions].astype(np.float64)
            rows -= rows.max(axis=-1, keepdims=True)
            of_targets = rows[np.arange(len(rows)), targets[start : start + _ROWS]]
            self.total += float((np.log(np.exp(rows).sum(axis=-1)) - of_targets).sum())
        self.count += len(targets)

    def eval(self):
        """``{"loss": nats per trained token, "PPL": its exponential, "tokens": trained tokens}``.

        Raises:
            ValueError: no token was trained.
        """
        total, count = self.total, self.count
        if self.data_parallel:
            sums = ops.AllReduce()(Tensor([total, count], ms.float32)).asnumpy()
            total, count = float(sums[0]), round(float(sums[1]))
        if count == 0:
            raise ValueError(
                "the evaluation data hold no trained token: every label is ignored. Prepare them with "
                "telechat_preprocess.py, which refuses such records."
            )
        loss = total / count
        type(self).latest = {
            "loss": loss,
            "PPL": math.exp(loss) if loss < math.log(1e300) else math.inf,
            "tokens": count,
        }
        return self.latest
