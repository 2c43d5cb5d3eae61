"""How long a step takes: a roofline of matrix units, memory and links, and the pipeline's schedule.

    seconds of a pass = operations / (PEAK * compute) + bytes moved / MEMORY + seconds on links / links

Two numbers are fitted, to the four training speeds that are published for TeleChat2 (published.py): the
shares of the peak and of the links' bandwidth that are reached. The others are a data sheet's (hardware.py).
"""

from dataclasses import dataclass

from research.telechat2.plan.costs import Cost, StepCosts, step_costs
from research.telechat2.plan.hardware import MEMORY, PEAK
from research.telechat2.plan.schedule import Schedule, schedule
from research.telechat2.plan.workload import Workload

ASSUMPTIONS = (
    "Atlas 800T A2: 313 TFLOPS (bfloat16), memory 1.6 TB/s, 28 GB/s to each NPU of a node, 25 GB/s to others",
    "collectives go first across nodes and then within them, and wait for computation as it waits for them",
    "gradients and weights travel while nothing is computed",
    "n interleaved copies of a layer (fine_grain_interleave) leave 1/n of its tensor communication bare",
    "tokens go to experts equally often where there is no capacity",
)


@dataclass(frozen=True)
class Efficiency:
    """The two fitted constants: shares of PEAK and of the links' bandwidth."""

    compute: float
    links: float

    def seconds(self, cost: Cost) -> float:
        """What a cost takes."""
        return cost.flops / (PEAK * self.compute) + cost.moved / MEMORY + cost.links / self.links


FITTED = Efficiency(compute=0.783, links=0.431)


@dataclass(frozen=True)
class Throughput:
    """A step's time, and what it consists of.

    Attributes:
        tokens_per_second: of one NPU.
        step_seconds: of one step of the optimizer.
        pipeline_seconds, optimizer_seconds: its parts: passes, and what follows them once.
        bubble: share of the passes' time in which stages are idle.
        model_flops_per_token: matrix products and attention, forward and backward, recomputation apart.
        utilization: share of PEAK that these amount to (MFU).
        schedule: of the passes.
    """

    tokens_per_second: float
    step_seconds: float
    pipeline_seconds: float
    optimizer_seconds: float
    bubble: float
    model_flops_per_token: float
    utilization: float
    schedule: Schedule


def throughput(run: Workload, efficiency: Efficiency = FITTED, costs: StepCosts | None = None) -> Throughput:
    """Predict a run's speed.

    Args:
        efficiency: other constants than the fitted ones.
        costs: the run's, if they are known.

    Raises:
        ValueError: see schedule.
    """
    costs = costs or step_costs(run)
    forward, backward = (
        [[efficiency.seconds(cost) for cost in row] for row in table]
        for table in (costs.forward, costs.backward)
    )
    plan = schedule(forward, backward, run.micro_batches)
    update = max(map(efficiency.seconds, costs.update))
    step = plan.seconds + update
    speed = run.step_tokens / run.devices / step
    flops = model_flops_per_token(run)
    return Throughput(speed, step, plan.seconds, update, plan.bubble, flops, speed * flops / PEAK, plan)


def model_flops_per_token(run: Workload) -> float:
    """Operations that training on a token takes at least, a multiplication and an addition being two.

    Six for each weight that a token is multiplied by, of experts those that it is sent to; and for causal
    attention ``6·S·H`` for each layer.
    """
    hidden, blocks = run.hidden_size, run.moe.top_k if run.moe else 1
    layer = 2 * hidden * hidden + 2 * hidden * run.kv_size + 3 * blocks * hidden * run.intermediate_size
    return (
        6 * (run.num_layers * layer + hidden * run.vocab_size) + 6 * run.num_layers * run.seq_length * hidden
    )
