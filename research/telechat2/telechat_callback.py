"""TelechatMonitor: what a user wants to see of a training run beside MindFormers' loss lines."""

from pathlib import Path

import numpy as np
from mindspore import Tensor

from research.telechat2.telechat_compat import (
    Callback,
    MindFormerModuleType,
    MindFormerRegister,
    is_main_rank,
    logger,
    output_directory,
)
from research.telechat2.telechat_files import atomic_write


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class TelechatMonitor(Callback):
    """Draws the loss curve, and counts the steps whose records held no trained token.

    Such a step has loss 0 exactly and gradients of 0; preprocessing refuses to write such records, but data
    from elsewhere may hold them. ``<output_dir>/loss_curve.png`` is drawn anew at the end of each epoch; a
    resumed run has a picture of its own, named by its first step.
    """

    def __init__(self):
        super().__init__()
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.untrained_steps = 0

    def step_end(self, run_context):
        """Remember the loss of this step."""
        params = run_context.original_args()
        loss = _scalar(params.net_outputs)
        self.steps.append(int(params.cur_step_num))
        self.losses.append(loss)
        if loss == 0.0:
            self.untrained_steps += 1
            logger.warning("Step %d trained nothing: every label of its records is ignored.", self.steps[-1])

    def epoch_end(self, run_context):
        """Draw what is known so far, on one rank."""
        if self.losses and is_main_rank():
            first = self.steps[0]
            name = "loss_curve.png" if first == 1 else f"loss_curve_from_step_{first}.png"
            draw_loss_curve(self.steps, self.losses, Path(output_directory()) / name)

    def end(self, run_context):
        """Say how many steps were wasted."""
        if self.untrained_steps:
            logger.warning(
                "%d of %d steps trained nothing: every label of their records is ignored. "
                "Prepare the data with telechat_preprocess.py, which refuses such records.",
                self.untrained_steps,
                len(self.steps),
            )


def _scalar(outputs) -> float:
    """The loss in what a training step returns: itself, or the first of a tuple."""
    loss = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    return float(np.mean(loss.asnumpy() if isinstance(loss, Tensor) else loss))


def draw_loss_curve(steps: list[int], losses: list[float], path: Path) -> None:
    """Write a PNG of loss over steps, the loss on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title="TeleChat2 training")
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
