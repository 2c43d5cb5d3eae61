"""TelechatMonitor: what a user wants to see of a training run beside MindFormers' loss lines."""

import re
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn

from research.telechat2.telechat_compat import (
    Callback,
    MindFormerModuleType,
    MindFormerRegister,
    get_tensorboard_writer,
    is_main_rank,
    library_logger,
    logger,
    output_directory,
)
from research.telechat2.telechat_files import atomic_write


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class TelechatMonitor(Callback):
    """Draws the loss curve, and counts the steps whose records held no trained token.

    Such a step has loss 0 exactly and gradients of 0; preprocessing refuses to write such records, but data
    from elsewhere may hold them. (The auxiliary loss of a mixture of experts hides them.)
    ``<output_dir>/loss_curve.png`` is drawn anew at the end of each epoch; a resumed run has a picture of its
    own, named by its first step.

    For a mixture of experts every step says how evenly the tokens went to the experts and how many choices
    were dropped: one line in the log, and TensorBoard scalars of each layer.
    """

    def __init__(self):
        super().__init__()
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.untrained_steps = 0
        self.expert_loads: dict[int, Parameter] = {}

    def begin(self, run_context):
        """Find the experts' loads in the model."""
        self.expert_loads = expert_loads(run_context.original_args().train_network)

    def step_end(self, run_context):
        """Remember the loss of this step."""
        params = run_context.original_args()
        loss = _scalar(params.net_outputs)
        self.steps.append(int(params.cur_step_num))
        self.losses.append(loss)
        if loss == 0.0:
            self.untrained_steps += 1
            logger.warning("Step %d trained nothing: every label of its records is ignored.", self.steps[-1])
        if self.expert_loads:
            report_expert_loads(self.expert_loads, self.steps[-1])

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


def expert_loads(network: nn.Cell) -> dict[int, Parameter]:
    """Layer -> ``expert_load`` [2, E] of every mixture of experts in the network; see TelechatMoE."""
    pattern = re.compile(r"layers\.(\d+)\.feed_forward\.expert_load$")
    found = ((pattern.search(parameter.name), parameter) for parameter in network.get_parameters())
    return {int(match[1]): parameter for match, parameter in found if match}


def report_expert_loads(loads: dict[int, Parameter], step: int) -> None:
    """Log the busiest and the idlest expert and the choices dropped; give TensorBoard those of each layer.

    Loads are relative to an even distribution: 1.0 is a fair share.
    """
    layers = np.array(list(loads))
    sent, taken = np.stack([load.asnumpy() for load in loads.values()], axis=1)
    relative = sent * sent.shape[1]
    dropped = sent.sum(1) - taken.sum(1)
    busy, idle = (np.unravel_index(index, sent.shape) for index in (relative.argmax(), relative.argmin()))
    library_logger.info(
        "{ step %d, experts: busiest %.2f of a fair share (layer %d, expert %d), idlest %.2f "
        "(layer %d, expert %d), "
        "dropped choices %.2f%%, at most %.2f%% (layer %d) }",
        step, relative[busy], layers[busy[0]], busy[1], relative[idle], layers[idle[0]], idle[1],
        100 * dropped.mean(), 100 * dropped.max(), layers[dropped.argmax()],
    )  # fmt: skip
    if (writer := get_tensorboard_writer()) is not None:
        for layer, load, share in zip(layers, relative, dropped, strict=True):
            writer.add_scalar(f"experts/busiest/layer_{layer}", load.max(), global_step=step)
            writer.add_scalar(f"experts/idlest/layer_{layer}", load.min(), global_step=step)
            writer.add_scalar(f"experts/dropped/layer_{layer}", share, global_step=step)


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
