"""Compile a run's training step for a rank of each stage of its pipeline, and sum up what was compiled.

    for stage in dry_run(settings):
        print(stage.table())

See simulate.py for how, and graph.py for the terms of a report.
"""

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write
from research.telechat2.common.tables import table
from research.telechat2.config.check import check
from research.telechat2.config.sections import Settings
from research.telechat2.plan.dry_run.graph import Collective, Operator
from research.telechat2.plan.dry_run.simulate import STRATEGY, Report, simulate

STRATEGY_FILE = "ckpt_strategy_rank_{rank}.ckpt"  # as MindFormers names them in output/strategy


@dataclass(frozen=True, order=True)
class Traffic:
    """Collectives of one kind: see Collective. ``bytes`` are what this rank sends in a step."""

    phase: str
    role: str
    kind: str
    group_size: int
    dtype: str
    count: int
    bytes: int


@dataclass(frozen=True, order=True)
class Computation:
    """Operators of one kind: the dtypes of inputs and output, and executions in a step."""

    phase: str
    kind: str
    inputs: str
    output: str
    count: int


@dataclass(frozen=True)
class CompiledStage:
    """What one rank stores, sends and computes in a training step.

    Attributes:
        stage, rank: of the pipeline, and of the cluster.
        seconds, peak_bytes: what the compilation took, see Report.
        bytes: what the rank stores: ``weights``, ``optimizer`` (moments), ``gradients`` (accumulated over
            micro-batches), ``other``.
        traffic, computations: by kind, those with the most bytes, and the most executions, first.
        strategy_file: where MindSpore's strategies were written to, if asked.
    """

    stage: int
    rank: int
    seconds: dict[str, float]
    peak_bytes: int
    bytes: dict[str, int]
    traffic: tuple[Traffic, ...]
    computations: tuple[Computation, ...]
    strategy_file: str | None

    def as_dict(self) -> dict[str, object]:
        """This stage for JSON."""
        return asdict(self)

    def table(self) -> str:
        """This stage for people."""
        sizes = ", ".join(f"{name} {_size(size)}" for name, size in self.bytes.items() if size)
        traffic = [["phase", "role", "collective", "group", "dtype", "times", "sent"]]
        traffic += [[*map(str, astuple(row)[:-1]), _size(row.bytes)] for row in self.traffic]
        computed = [["phase", "operator", "inputs", "output", "times"]]
        computed += [[*map(str, astuple(row))] for row in self.computations if row.phase != "backward"]
        strategies = [f"strategies    {self.strategy_file}"] if self.strategy_file else []
        seconds = self.seconds["build"] + self.seconds["compile"]
        head = f"stage {self.stage}: rank {self.rank}, compiled in {seconds:.0f} s with"
        head += f" {_size(self.peak_bytes)} of memory"
        stored = f"stored        {sizes}"
        return "\n".join([head, stored, *strategies, "", *table(traffic), "", *table(computed)])


def dry_run(
    settings: Settings,
    device_num: int | None = None,
    rank: int | None = None,
    output_dir: str | Path | None = None,
) -> Iterator[CompiledStage]:
    """Compile the step of each stage's first rank, or of ``rank`` alone, one after the other.

    Args:
        settings: of ``read_settings``.
        device_num: see ``check``.
        rank: the one rank to compile for; None: the first of each stage.
        output_dir: where ``strategy/ckpt_strategy_rank_*.ckpt`` are written; ranks of a stage have the same.

    Raises:
        UsageError: the plan breaks a rule, is not of one graph for several devices, has no such rank, or a
            strategy file exists. CompilationError, a subclass: MindSpore refuses it.
    """
    checked = check(settings, device_num)
    if checked.kind != "semi_auto":
        raise UsageError(
            "the dry run compiles one graph that is sharded over a cluster, but this run is of "
            f"{'one device' if checked.kind == 'single' else 'processes that are copies of each other'}. Use "
            "a config with use_parallel: True and parallel.parallel_mode: 1."
        )
    each = checked.device_num // len(checked.stages)
    ranks = [rank] if rank is not None else range(0, checked.device_num, each)
    if not all(0 <= rank < checked.device_num for rank in ranks):
        raise UsageError(f"--rank is {rank}, but ranks are 0 to {checked.device_num - 1}.")
    files = {rank: _strategy_file(output_dir, rank) for rank in ranks}
    for rank in ranks:
        report = _compile(settings, checked.device_num, rank, files[rank])
        print(f"compiled stage {rank // each}", file=sys.stderr, flush=True)
        yield _summary(report, rank // each, files[rank])


def _strategy_file(output_dir: str | Path | None, rank: int) -> Path | None:
    if output_dir is None:
        return None
    path = Path(output_dir).absolute() / "strategy" / STRATEGY_FILE.format(rank=rank)
    if path.exists():
        raise UsageError(f"{path} exists and is not overwritten; give another --output_dir.")
    return path


def _compile(settings: Settings, device_num: int, rank: int, strategy_file: Path | None) -> Report:
    """The rank's report; the folder that an error names is left, of a success nothing but the strategies."""
    folder = Path(tempfile.mkdtemp(prefix="telechat_dry_run_"))
    target = "research.telechat2.run.training_step:build"
    report = simulate(target, {"settings": settings}, device_num=device_num, rank=rank, folder=folder)
    if strategy_file:
        strategy_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(strategy_file) as temporary:
            shutil.copyfile(folder / STRATEGY, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _summary(report: Report, stage: int, strategy_file: Path | None) -> CompiledStage:
    stored = {"weights": 0, "optimizer": 0, "gradients": 0, "other": 0}
    for parameter in report.parameters:
        stored[_role(parameter.name)] += parameter.bytes
    return CompiledStage(
        stage=stage,
        rank=report.rank,
        seconds=report.seconds,
        peak_bytes=report.peak_bytes,
        bytes=stored,
        traffic=_traffic(report.collectives),
        computations=_computations(report.operators),
        strategy_file=str(strategy_file) if strategy_file else None,
    )


def _role(name: str) -> str:
    if name.startswith(("adam_m.", "adam_v.")):
        return "optimizer"
    if name.startswith("accu_grads."):
        return "gradients"
    return "weights" if name.startswith(("model.", "lm_head.")) else "other"


def _traffic(collectives: tuple[Collective, ...]) -> tuple[Traffic, ...]:
    counts: Counter[tuple[str, str, str, int, str]] = Counter()
    sent: Counter[tuple[str, str, str, int, str]] = Counter()
    for found in collectives:
        key = (found.phase, found.role, found.kind, len(found.ranks), found.input.dtype)
        counts[key] += found.count
        sent[key] += found.count * found.bytes
    rows = [Traffic(*key, counts[key], sent[key]) for key in counts]
    return tuple(sorted(rows, key=lambda row: (-row.bytes, row)))


def _computations(operators: tuple[Operator, ...]) -> tuple[Computation, ...]:
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for found in operators:
        inputs = ", ".join(sorted({tensor.dtype for tensor in found.inputs}))
        output = found.outputs[0].dtype if found.outputs else ""
        counts[found.phase, found.kind, inputs, output] += found.count
    rows = [Computation(*key, count) for key, count in counts.items()]
    return tuple(sorted(rows, key=lambda row: (-row.count, row)))


def _size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"
