"""TelechatPerplexity: loss and perplexity of evaluation data, by token."""

import math
from typing import ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from research.telechat2.common.errors import UsageError
from research.telechat2.compat.library import MindFormerModuleType, MindFormerRegister, process_group


@MindFormerRegister.register(MindFormerModuleType.METRIC)
class TelechatPerplexity(nn.Metric):
    """Sum of the losses of all trained tokens divided by their number, and the exponential of it.

    It does not depend on how records are batched, which the mean of batch means (MindFormers'
    PerplexityMetric) does where batches hold different numbers of trained tokens. The device sends two
    numbers a batch; they are added up here in double precision and whole numbers.

    In data parallel runs the tokens of all processes count. With pipeline stages the last one has the losses,
    and the others no result.
    """

    latest: ClassVar[dict | None] = None  # what ``eval`` last returned: MindFormers only logs it

    def __init__(self):
        super().__init__()
        self.data_parallel = ms.get_auto_parallel_context("parallel_mode") == "data_parallel"
        processes, rank, _ = process_group()
        last = processes - processes // ms.get_auto_parallel_context("pipeline_stages")
        self.last_rank, self.has_losses, self.reports = processes - 1, rank >= last, rank == last
        self.clear()

    def clear(self):
        """Forget the tokens so far."""
        self.total, self.count, self.batches = 0.0, 0, 0

    def update(self, *outputs):
        """Add a batch: the sum of the losses of its trained tokens, and their number, of one element each.

        Raises:
            UsageError: the sum is not finite, or the model returns something else.
        """
        self.batches += 1
        if not self.has_losses:
            return  # of this stage the model returns what it gives to the next one
        if len(outputs) != 2:
            raise UsageError(
                "the evaluation data have no column labels, from which the model takes what is trained; set "
                "eval_dataset.input_columns: ['input_ids', 'labels']."
            )
        total, count = (
            (value.asnumpy() if isinstance(value, Tensor) else np.asarray(value)).item() for value in outputs
        )
        self.total += total
        self.count += round(count)
        if not self.data_parallel:  # where all processes are to raise it: at the end
            self._check_finite()

    def eval(self):
        """``{"loss": nats per trained token, "PPL": its exponential, "tokens": trained tokens}``, printed.

        Raises:
            UsageError: no token was trained, or the loss is not finite.
        """
        if not self.has_losses:
            print(f"evaluation: its result is in the log of rank {self.last_rank}", flush=True)
            return {}
        if self.data_parallel:
            self.total, self.count = _of_all_processes(self.total, self.count)
            self._check_finite()
        if self.count == 0:
            raise UsageError(
                "the evaluation data hold no trained token: every label is ignored. Prepare them with "
                "telechat_preprocess.py, which refuses such records."
            )
        loss = self.total / self.count
        found = {
            "loss": loss,
            "PPL": math.exp(loss) if loss < math.log(1e300) else math.inf,
            "tokens": self.count,
        }
        type(self).latest = found
        if self.reports:
            print(
                f"evaluation: loss {loss:.4f} (nats per trained token), perplexity {found['PPL']:.4f}, "
                f"over {self.count:,} trained tokens",
                flush=True,
            )
        return found

    def _check_finite(self) -> None:
        if not math.isfinite(self.total):
            raise UsageError(
                f"the loss is {self.total} after {self.batches} evaluation batches, so the logits are not "
                "finite: the weights hold infinite values or NaN (look for the step at which training "
                "overflowed), or compute_dtype float16 overflows (use bfloat16 or float32)."
            )


def _of_all_processes(total: float, count: int) -> tuple[float, int]:
    """The sums over all processes, exact: what travels are the numbers' bits, as no device adds doubles."""
    bits = np.concatenate([np.array([total]).view(np.int32), np.array([count]).view(np.int32)])
    rows = ops.AllGather()(Tensor(bits)).asnumpy().reshape(-1, 4)
    totals, counts = rows[:, :2].copy().view(np.float64), rows[:, 2:].copy().view(np.int64)
    return float(totals.sum()), int(counts.sum())
