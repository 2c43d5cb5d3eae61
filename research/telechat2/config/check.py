"""Whether a run's parallel plan is legal, and what it comes to: devices, batch, stages; without compiling.

    checked = check(settings, device_num=16)
    print(checked.table())

A plan that breaks a rule is a UsageError with the values. The rules are those that TelechatConfig obeys when
a run starts; here is added only what its Trainer and MindSpore's context decide.
"""

from dataclasses import asdict, dataclass
from math import prod

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all, noted_in, refuse
from research.telechat2.common.tables import table
from research.telechat2.config.fields import settings_of
from research.telechat2.config.kernel_limits import (
    check_cpu_dtypes,
    check_fused_attention,
    check_paged_kernels,
)
from research.telechat2.config.kinds import check_number
from research.telechat2.config.mindspore_context import check_parallel_sections
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.optimization import check_optimization
from research.telechat2.config.parallel import check_cluster, check_exchange
from research.telechat2.config.pipeline import check_schedule, partition_of
from research.telechat2.config.plan_settings import ParallelSettings
from research.telechat2.config.recompute import COMMUNICATION, SELECTED, read_recompute
from research.telechat2.config.sections import Settings, section_of
from research.telechat2.config.settings import DEFAULTS, model_config, with_defaults
from research.telechat2.config.unused_settings import without_effect

SEMI_AUTO = (1, "semi_auto_parallel", "SEMI_AUTO_PARALLEL")
_FACTORS = ("data_parallel", "context_parallel", "model_parallel", "pipeline_stage")
DATA_PARALLEL = (0, "data_parallel", "DATA_PARALLEL")


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        ranks: its first and last rank.
        layers: for each chunk the first layer and the one after the last.
        recompute: for each choice of ``recompute_config``, and each pattern of operators that the YAML names
            itself, how many of its layers it holds for.
    """

    ranks: tuple[int, int]
    layers: tuple[tuple[int, int], ...]
    recompute: dict[str, int]

    @property
    def num_layers(self) -> int:
        """Layers of all chunks together."""
        return sum(end - start for start, end in self.layers)


@dataclass(frozen=True)
class CheckedPlan:
    """A legal plan.

    Attributes:
        kind: ``single`` (one device), ``data_parallel`` (processes that are copies) or ``semi_auto`` (one
            graph for all).
        device_num: devices it takes.
        factors: the numbers whose product that is.
        batch: the numbers whose product is the global batch in sequences.
        global_batch, seq_length: sequences of a step, and tokens of each.
        stages: of the pipeline; one where there is none.
        notes: settings without effect, and remarks on others.
    """

    kind: str
    device_num: int
    factors: dict[str, int]
    batch: dict[str, int]
    global_batch: int
    seq_length: int
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> Settings:
        """This plan for JSON."""
        return asdict(self)

    def table(self) -> str:
        """This plan for people."""
        tokens = self.global_batch * self.seq_length
        lines = [
            f"devices       {_product(self.device_num, self.factors)}",
            f"global batch  {_product(self.global_batch, self.batch)} sequences",
            f"tokens a step {tokens:,} = sequences x {self.seq_length:,}",
            "",
            *table(_stage_rows(self.stages)),
        ]
        return "\n".join([*lines, *("\nnote: " + note for note in self.notes)])


def check(settings: Settings, device_num: int | None = None) -> CheckedPlan:
    """Check the plan of a run.

    Args:
        settings: of ``read_settings``.
        device_num: how many devices there are; None: as many as the plan takes.

    Raises:
        UsageError: a rule is broken.
    """
    kind = kind_of(settings)
    found: list[str] = []
    if settings.get("run_mode", "train") in ("train", "finetune"):
        with noted_in(found):
            check_optimization(settings)
    with noted_in(found):
        check_parallel_sections(settings)
    plan = config = batch = None
    devices = device_num or 1
    with noted_in(found):
        plan = _effective_plan(settings, kind)
        devices = prod(plan[name] for name in _FACTORS) if kind == "semi_auto" else devices
    if plan:
        with noted_in(found):
            batch = _batch(settings, plan, kind, devices)
        with noted_in(found):
            config = model_config(settings, plan)
    if config:
        with noted_in(found):
            check_all(
                (_check_kernels, settings, config),
                (_check_devices, settings, config, kind, device_num, devices),
            )
    refuse(found)
    assert plan is not None and batch is not None and config is not None
    named = {name: plan[name] for name in _FACTORS if plan[name] > 1 or name != "context_parallel"}
    factors = named if kind == "semi_auto" else {"processes": devices}
    return CheckedPlan(
        kind=kind,
        device_num=devices,
        factors=factors,
        batch=batch,
        global_batch=prod(batch.values()),
        seq_length=config.seq_length,
        stages=_stages(config, devices),
        notes=tuple(without_effect(settings, kind)),
    )


def _check_devices(
    settings: Settings, config: ModelSettings, kind: str, device_num: int | None, devices: int
) -> None:
    """Whether ``device_num``, if that is known, and MindSpore's context fit a plan of ``devices``."""
    if kind == "semi_auto":
        _check_context(settings, config, device_num or devices)
    elif device_num not in (None, 1) and kind == "single":
        raise UsageError(
            f"use_parallel is False, so the run takes 1 device, not {device_num}; set use_parallel to True, "
            "or take 1."
        )


def _check_kernels(settings: Settings, config: ModelSettings) -> None:
    """What the target's kernels can run."""
    if section_of(settings, "context").get("device_target", "Ascend") == "CPU":
        check_cpu_dtypes(config)
    elif config.use_past:
        check_paged_kernels(config)
    elif config.use_flash_attention:
        check_fused_attention(config)


def kind_of(settings: Settings) -> str:
    """``single``, ``data_parallel`` or ``semi_auto``, see CheckedPlan."""
    if not settings.get("use_parallel"):
        return "single"
    mode = section_of(settings, "parallel").get("parallel_mode", 1)
    if mode in SEMI_AUTO:
        return "semi_auto"
    if mode in DATA_PARALLEL:
        return "data_parallel"
    raise UsageError(
        f"parallel.parallel_mode is {mode!r}; TeleChat2's graphs are split by 1 (semi-automatic) or copied "
        "by 0 (data parallel). Set one of them, or use_parallel: False."
    )


def _effective_plan(settings: Settings, kind: str) -> Settings:
    """``parallel_config`` as the Trainer leaves it: one device's where no graph is split."""
    given = with_defaults(settings, "parallel_config")
    rules = [rule for rule in settings_of(ParallelSettings).values() if not rule.choices]
    check_all(*[(rule.check, given[rule.name], "parallel_config") for rule in rules])
    if kind != "semi_auto":
        return DEFAULTS["parallel_config"]
    if given["pipeline_stage"] > 1:
        return given | {"vocab_emb_dp": False}
    return given | {"micro_batch_num": 1}


def _check_context(settings: Settings, config: ModelSettings, devices: int) -> None:
    """What MindSpore's context must say for one graph of all devices."""
    parallel = section_of(settings, "parallel")
    check_cluster(config, devices, parallel.get("gradients_mean", False))
    check_exchange(config, parallel.get("enable_alltoall", False))
    pipeline = section_of(settings, "parallel.pipeline_config")
    check_schedule(
        config.pp_interleave_num,
        pipeline.get("pipeline_scheduler", "1f1b"),
        pipeline.get("pipeline_interleave", False),
    )
    if not parallel.get("full_batch", True):
        _check_dataset_strategy(parallel.get("dataset_strategy"), config.parallel_config.data_parallel)


def _check_dataset_strategy(strategy: object, dp: int) -> None:
    """MindFormers' rule where processes read parts of the batch."""
    rows = strategy[0][0] if isinstance(strategy, list) and strategy and strategy[0] else None
    if rows != dp:
        raise UsageError(
            f"parallel.full_batch is False and parallel.dataset_strategy {strategy!r}; each of the two "
            f"columns must be split data_parallel times: [[{dp}, 1], [{dp}, 1]]. Or set full_batch: True."
        )


def _batch(settings: Settings, plan: Settings, kind: str, devices: int) -> dict[str, int]:
    """The factors of the global batch."""
    runner = with_defaults(settings, "runner_config")
    accumulation = runner["gradient_accumulation_steps"] or 1
    check_number("runner_config.batch_size", runner["batch_size"], whole=True, least=1)
    check_number("runner_config.gradient_accumulation_steps", accumulation, whole=True, least=1)
    stages = plan["pipeline_stage"]
    if accumulation > 1 and (kind != "semi_auto" or stages > 1):
        raise UsageError(
            f"runner_config.gradient_accumulation_steps is {accumulation}, which MindFormers would take for "
            f"1 {'in a pipeline' if stages > 1 else 'where no graph is split'}; set it to 1, and "
            f"{'parallel_config.micro_batch_num' if stages > 1 else 'runner_config.batch_size'} higher."
        )
    factors = {"batch_size": runner["batch_size"]}
    if kind == "semi_auto":
        factors["data_parallel"] = plan["data_parallel"]
        factors["micro_batch_num"] = plan["micro_batch_num"]
        factors["gradient_accumulation_steps"] = accumulation
    else:
        factors["processes"] = devices
    return {name: value for name, value in factors.items() if value > 1 or name == "batch_size"}


def _stages(config: ModelSettings, devices: int) -> tuple[Stage, ...]:
    counts = partition_of(config)
    starts: list[list[tuple[int, int]]] = []
    start = 0
    for row in counts:
        starts.append([])
        for count in row:
            starts[-1].append((start, start + count))
            start += count
    tables = read_recompute(config)
    chosen = {"recompute": tables.whole}
    for name, by_pattern in (
        ("select_recompute", tables.selected),
        ("select_comm_recompute", tables.communication),
    ):
        default = SELECTED if name == "select_recompute" else COMMUNICATION
        for pattern, layers in by_pattern.items():
            chosen[name if pattern == default else f"{name} {pattern}"] = layers
    each = devices // len(counts[0])
    return tuple(
        Stage(
            ranks=(stage * each, (stage + 1) * each - 1),
            layers=tuple(row[stage] for row in starts),
            recompute={name: sum(row[stage] for row in table) for name, table in chosen.items()},
        )
        for stage in range(len(counts[0]))
    )


def _product(total: int, factors: dict[str, int]) -> str:
    if len(factors) == 1 and total in factors.values():
        return f"{total:,} = {next(iter(factors))}"
    return f"{total:,} = " + " x ".join(f"{name} {value}" for name, value in factors.items())


def _stage_rows(stages: tuple[Stage, ...]) -> list[list[str]]:
    chosen = [name for name in stages[0].recompute if any(stage.recompute[name] for stage in stages)]
    chunks = len(stages[0].layers)
    heads = ["stage", "ranks", "layers", *(f"chunk {i}" for i in range(chunks if chunks > 1 else 0)), *chosen]
    rows = [heads]
    for number, stage in enumerate(stages):
        spans = [f"{start}-{end - 1}" if end > start else "-" for start, end in stage.layers]
        layers = [str(stage.num_layers), *spans] if chunks > 1 else [f"{stage.num_layers} ({spans[0]})"]
        ranks = f"{stage.ranks[0]}-{stage.ranks[1]}"
        rows.append([str(number), ranks, *layers, *(str(stage.recompute[name]) for name in chosen)])
    return rows
