"""TelechatMonitor: what a user wants to see of a training run beside MindFormers' loss lines."""

import re
import time

import numpy as np
from mindspore import Parameter, Tensor, nn

from research.telechat2.common.errors import UsageError
from research.telechat2.compat.library import (
    Callback,
    MindFormerModuleType,
    MindFormerRegister,
    get_real_rank,
    get_tensorboard_writer,
    is_main_rank,
    library_logger,
    logger,
    loss_monitor,
    loss_rank,
    mean_over_parts,
    output_directory,
    pipeline_place,
)
from research.telechat2.run.metrics import Metrics
from research.telechat2.run.progress import Progress
from research.telechat2.run.screen import launcher_shows, repeat_for_launcher


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class TelechatMonitor(Callback):
    """Shows the progress of a training, keeps its steps, draws the loss curve, and names wasted steps.

    One process that has the loss does so. A step whose records hold no trained token has loss 0 exactly, but
    for the auxiliary loss of a mixture of experts. For such a mixture the log says how evenly the tokens went
    to the experts of this process's stage and how many choices were dropped, as often as MFLossMonitor
    writes; TensorBoard has scalars of each layer.

    Args:
        history: the ``metrics.jsonl`` of the run that this one continues.
    """

    latest: "TelechatMonitor | None" = None  # of this process, for run() to finish

    def __init__(self, history: str | None = None):
        super().__init__()
        self.history = history
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.untrained_steps = self.overflows = self.initial_step = 0
        self.each, self.not_finite, self.not_finite_since = 1, False, 0
        self.expert_loads: dict[int, Parameter] = {}
        self.reports = get_real_rank() == loss_rank()
        self.metrics: Metrics | None = None
        self.progress: Progress | None = None
        self.step_began = time.monotonic()
        TelechatMonitor.latest = self

    def begin(self, run_context):
        """Find the step to begin after, and the experts' loads in the model."""
        params = run_context.original_args()
        self.expert_loads = expert_loads(params.train_network)
        monitor = loss_monitor(params)
        self.each = getattr(monitor, "per_print_times", 1)
        self.initial_step = getattr(monitor, "initial_step", 0) or 0
        if self.reports:
            self.metrics = Metrics(output_directory(), self.initial_step, self.history)
        total = _total_steps(params, monitor, self.initial_step)
        if self.reports:
            repeat_for_launcher(True)
        if total and (self.reports or (is_main_rank() and not launcher_shows(loss_rank()))):
            _print_begin(self.initial_step, total, monitor)
            self.progress = Progress(self.initial_step + 1, total)
        self.step_began = time.monotonic()

    def step_end(self, run_context):
        """Remember and show this step."""
        params = run_context.original_args()
        step = self.initial_step + int(params.cur_step_num)
        due = int(params.cur_step_num) % self.each == 0
        if self.reports:
            self._keep(params, step)
        if self.progress:
            loss = self.losses[-1] if self.reports else None
            self.progress.show(step, loss, _number(params.net_outputs, 3), due)
        if self.expert_loads and due:
            report_expert_loads(self.expert_loads, step)

    def _keep(self, params, step: int) -> None:
        loss = mean_over_parts(params, _number(params.net_outputs, 0))
        seconds, self.step_began = time.monotonic() - self.step_began, time.monotonic()
        self.steps.append(step)
        self.losses.append(loss)
        if loss == 0.0:
            self.untrained_steps += 1
            logger.warning("Step %d trained nothing: every label of its records is ignored.", step)
        if not np.isfinite(loss) and not self.not_finite:
            logger.warning("The loss of step %d is %s; the log says more of each step.", step, loss)
            self.not_finite_since = step
        self.not_finite = not np.isfinite(loss)
        if _number(params.net_outputs, 1):
            self.overflows += 1
            if self.overflows == 1:
                logger.warning("Step %d is left out: its gradients are not finite (overflow).", step)
        rate = _number(params.net_outputs, 3)
        if self.metrics:
            norm = _number(params.net_outputs, 4)
            self.metrics.add(step, loss, learning_rate=rate, grad_norm=norm, seconds=round(seconds, 4))
            self.metrics.draw_now_and_then()
        if rate is not None and not np.isfinite(rate):
            raise UsageError(
                f"the learning rate of step {step} is {rate}, and so are the weights; change lr_schedule and "
                "start again from a checkpoint before it."
            )

    def check_end(self) -> None:
        """UsageError if the last loss is not finite."""
        if self.not_finite and self.losses:
            raise UsageError(
                f"the loss is not finite since step {self.not_finite_since} ({self.losses[-1]} at step "
                f"{self.steps[-1]}); lower the learning rate, or go on from a checkpoint before that step."
            )

    def end(self, run_context):
        """Draw the whole curve, and print how many steps were wasted."""
        self.finish()
        if self.untrained_steps:
            remedy = "Prepare the data with telechat_preprocess.py, which refuses such records."
            many = self.untrained_steps, len(self.steps)
            logger.warning(f"%d of %d steps trained nothing: every label is ignored. {remedy}", *many)
        if self.overflows:
            logger.warning("%d of %d steps were left out: overflow.", self.overflows, len(self.steps))

    def finish(self) -> None:
        """Leave the bar and draw what is known; also for a run that is interrupted or fails."""
        if self.progress:
            self.progress.close()
        if self.metrics:
            self.metrics.finish()
        if self.reports and not is_main_rank():
            repeat_for_launcher(False)  # the first worker says how it ends


def _total_steps(params, monitor, initial_step: int) -> int:
    """Steps of the whole run, with those before a resumed one; 0: not known."""
    epochs, steps = getattr(monitor, "origin_epochs", None), getattr(monitor, "steps_per_epoch", None)
    if epochs and steps:
        return epochs * steps
    rest = int(getattr(params, "epoch_num", 0) or 0) * int(getattr(params, "batch_num", 0) or 0)
    return initial_step + rest if rest else 0


def _print_begin(initial_step: int, total: int, monitor) -> None:
    epochs = getattr(monitor, "origin_epochs", None)
    of = f" ({epochs} epochs of {total // epochs})" if epochs else ""
    after = f", going on after step {initial_step}" if initial_step else ""
    print(f"training: {total} steps{of}{after}; compiling the graph", flush=True)


def _number(outputs, place: int) -> float | None:
    """One of a training step's loss, overflow, loss scale, learning rate, gradient norm; None: absent."""
    several = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    if place >= len(several) or several[place] is None:
        return None
    value = several[place]
    return float(np.mean(value.asnumpy() if isinstance(value, Tensor) else value))


def expert_loads(network: nn.Cell) -> dict[int, Parameter]:
    """Layer -> ``expert_load`` [2, E] of TelechatMoE, of every layer that this process's stage computes."""
    pattern = re.compile(r"layers\.(\d+)\.feed_forward\.expert_load$")
    found = ((pattern.search(parameter.name), parameter) for parameter in network.get_parameters())
    loads = {int(match[1]): parameter for match, parameter in found if match}
    stage, stages = pipeline_place()
    if stages == 1:
        return loads
    layers = ((re.search(r"layers\.(\d+)$", name), cell) for name, cell in network.cells_and_names())
    stage_of = {int(match[1]): cell.pipeline_stage for match, cell in layers if match}
    return {layer: load for layer, load in loads.items() if stage_of.get(layer, stage) == stage}


def report_expert_loads(loads: dict[int, Parameter], step: int) -> None:
    """Log the busiest and the idlest expert, 1.0 being a fair share, and the choices dropped."""
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
