"""Estimate a run's memory, communication and speed, in seconds and without MindSpore's compiler.

Parameters, gradients and optimizer are exact, communication follows the compiled graph, activations and times
are formulas.
"""

import re
from dataclasses import asdict, dataclass, field, replace
from math import prod

from research.telechat2.common.errors import UsageError
from research.telechat2.common.tables import table
from research.telechat2.config.sections import Settings, section_of
from research.telechat2.plan.estimate.communication import Communication, stage_communication
from research.telechat2.plan.estimate.costs import MEMORY, PEAK, Cost, StepCosts, step_costs
from research.telechat2.plan.estimate.memory import StageMemory, stage_memory
from research.telechat2.plan.estimate.schedule import Schedule, schedule
from research.telechat2.plan.estimate.workload import Workload, workload

GB = 1e9
ASSUMPTIONS = (
    "Atlas 800T A2: 313 TFLOPS (bfloat16), memory 1.6 TB/s, 28 GB/s to each NPU of a node, 25 GB/s to others",
    "collectives go across nodes first, then within them, and do not overlap with computation",
    "nor does the communication of gradients and weights",
    "n interleaved copies of a layer (fine_grain_interleave) expose 1/n of its tensor-parallel communication",
    "experts without a capacity get equally many tokens",
)


@dataclass(frozen=True)
class Efficiency:
    """The two fitted constants: shares of PEAK and of the links' bandwidth."""

    compute: float
    links: float

    def seconds(self, cost: Cost) -> float:
        return cost.flops / (PEAK * self.compute) + cost.moved / MEMORY + cost.links / self.links


FITTED = Efficiency(compute=0.783, links=0.431)


@dataclass(frozen=True)
class Throughput:
    """A step's time, and what it consists of.

    Attributes:
        tokens_per_second: of one NPU.
        pipeline_seconds, optimizer_seconds: its parts: passes, and what follows them once.
        bubble: share of the passes' time in which stages are idle.
        model_flops_per_token: matrix products and attention, forward and backward, recomputation apart.
        utilization: share of PEAK that these amount to (MFU).
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
    """Predict a run's speed; ``costs``: the run's, if they are known. UsageError: see schedule."""
    costs = costs or step_costs(run)
    forward, backward = (
        [list(map(efficiency.seconds, row)) for row in table] for table in (costs.forward, costs.backward)
    )
    passes = schedule(forward, backward, run.micro_batches)
    update = max(map(efficiency.seconds, costs.update))
    step = passes.seconds + update
    speed = run.step_tokens / run.devices / step
    flops = model_flops_per_token(run)
    return Throughput(speed, step, passes.seconds, update, passes.bubble, flops, speed * flops / PEAK, passes)


def model_flops_per_token(run: Workload) -> float:
    """Operations that training on a token takes at least, a multiplication and an addition being two.

    Six for each weight of a matrix product, of experts those that the token is sent to, without the router;
    and for causal attention ``6·S·H`` for each layer.
    """
    top_k = run.model.moe.top_k if run.model.moe else 1
    layer = sum(
        prod(run.dims[symbol] for symbol in row.shape) * (top_k if row.stacked else 1)
        for row in run.layer_rows
        if row.split is not None
    )
    attention = run.model.seq_length * run.model.hidden_size
    return 6 * (run.model.num_layers * (layer + attention) + run.model.hidden_size * run.model.vocab_size)


@dataclass(frozen=True)
class Estimate:
    """Memory, communication and speed of a run: of a device of each stage, in a step.

    ``limit_gb``: what a run may take of an NPU, by ``context.max_device_memory``; None: not known.
    """

    workload: Workload
    memory: tuple[StageMemory, ...]
    communication: tuple[tuple[Communication, ...], ...]
    throughput: Throughput
    limit_gb: float | None = field(default=None, compare=False)

    @property
    def peak_bytes(self) -> int:
        """Of the fullest stage's devices."""
        return max(stage.total for stage in self.memory)

    def as_dict(self) -> dict[str, object]:
        """This estimate for JSON: bytes and seconds; of the schedule its bubble alone."""
        speed = {name: value for name, value in vars(self.throughput).items() if name != "schedule"}
        return {
            "stages": [
                {
                    "stage": number,
                    "memory": asdict(memory) | {"total": memory.total},
                    "communication": [asdict(item) | {"bytes": item.bytes} for item in sent],
                }
                for number, (memory, sent) in enumerate(zip(self.memory, self.communication, strict=True))
            ],
            "peak_gb": self.peak_bytes / GB,
            "max_device_memory_gb": self.limit_gb,
            "throughput": speed,
            "efficiency": asdict(FITTED),
            "assumptions": list(ASSUMPTIONS),
        }

    def table(self) -> str:
        speed = self.throughput
        lines = [
            f"speed         {speed.tokens_per_second:,.0f} tokens/s/NPU predicted: a step of "
            f"{speed.step_seconds:.2f} s, {speed.optimizer_seconds:.2f} s of it for gradients and optimizer",
            f"bubble        {speed.bubble:.1%} of the stages' time",
            f"arithmetic    {speed.model_flops_per_token / 1e9:,.1f} GFLOP a token, {speed.utilization:.1%} "
            "of the peak, without recomputation",
            "",
            *table(_memory_rows(self.memory)),
            *self._fit(),
            "",
            *table(_communication_rows(self.communication)),
            "",
            f"assumed: {FITTED.compute:.0%} of the peak and {FITTED.links:.0%} of the links' bandwidth, "
            "fitted to four published speeds",
            *(f"assumed: {line}" for line in ASSUMPTIONS),
            "assumed: no memory of MindSpore's and CANN's own, which is 2 to 4 GB",
        ]
        return "\n".join(lines)

    def _fit(self) -> list[str]:
        if self.limit_gb is None:
            return []
        peak = f"{self.peak_bytes / GB:.2f} GB on the fullest NPU"
        if self.peak_bytes <= self.limit_gb * GB:
            return [f"fits          {peak}, of context.max_device_memory {self.limit_gb:g} GB"]
        return [
            f"DOES NOT FIT  {peak}, but context.max_device_memory is {self.limit_gb:g} GB: "
            + ", or ".join(self._remedies())
        ]

    def _remedies(self) -> list[str]:
        run, found = self.workload, []
        if sum(map(sum, run.recomputed)) < run.model.num_layers:
            found.append("recompute more layers (recompute_config.recompute)")
        if run.devices > 1:
            return [*found, f"look for a plan: --search {self.limit_gb:g}"]
        return [*found, "shard the model over several NPUs (use_parallel, model_parallel, pipeline_stage)"]


def estimate(settings: Settings) -> Estimate:
    """Of the settings of ``read_settings``.

    Raises:
        UsageError: the plan is not legal, or asks for what is not estimated; see workload and schedule.
    """
    if section_of(settings, "context").get("device_target") == "CPU":
        raise UsageError(
            "context.device_target is CPU, but estimates are for NPUs. "
            "Set context.device_target=Ascend and model.model_config.compute_dtype=bfloat16."
        )
    limit = limit_gb_of(settings)
    return replace(estimate_workload(workload(settings)), limit_gb=limit)


def limit_gb_of(settings: Settings) -> float:
    """``context.max_device_memory`` in GB of 10^9 bytes.

    MindSpore's GB are of 2^30 bytes; the difference is left for what no formula here counts.
    """
    limit = section_of(settings, "context").get("max_device_memory", "58GB")
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", str(limit))
    if found is None or not float(found[1]):
        raise UsageError(f"context.max_device_memory is {limit!r}; it must be a size such as 58GB.")
    return float(found[1])


def estimate_workload(run: Workload) -> Estimate:
    """Of a workload; UsageError: see schedule."""
    speed = throughput(run)
    stages = range(run.pp)
    return Estimate(
        workload=run,
        memory=tuple(stage_memory(run, stage, speed.schedule) for stage in stages),
        communication=tuple(tuple(stage_communication(run, stage)) for stage in stages),
        throughput=speed,
    )


def _memory_rows(memory: tuple[StageMemory, ...]) -> list[list[str]]:
    rows = [["GB of NPU", *asdict(memory[0]), "total"]]
    for number, stage in enumerate(memory):
        values = [*asdict(stage).values(), stage.total]
        rows.append([f"stage {number}", *(f"{value / GB:.2f}" for value in values)])
    return rows


def _communication_rows(stages: tuple[tuple[Communication, ...], ...]) -> list[list[str]]:
    """One row for each kind, group and phase, a column for each stage."""
    sent: dict[tuple[str, ...], list[int]] = {}
    for number, items in enumerate(stages):
        for item in items:
            key = (item.group, f"{item.ranks}", item.kind, item.what, item.phase)
            sent.setdefault(key, [0] * len(stages))[number] += item.bytes
    heads = ["group", "ranks", "sent, GB a step", "of", "phase", *(f"stage {i}" for i in range(len(stages)))]
    return [heads] + [[*key, *(f"{size / GB:.3f}" for size in sizes)] for key, sizes in sorted(sent.items())]
