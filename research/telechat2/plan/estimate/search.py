"""Search the plans of a model on a number of NPUs: those that are legal and fit, the fastest first.

Every plan keeps the global batch, so that it trains the same model. Stages get layers as equally as they
divide, and as few layers of each stage are recomputed as it takes to fit. Sequences stay whole, or are split
as the config's own ``context_parallel`` says.
"""

import re
import shlex
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import problems_of
from research.telechat2.common.tables import table
from research.telechat2.config.check import check
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.overrides import value_word
from research.telechat2.config.parallel import check_cluster, check_exchange, check_plan, devices_of
from research.telechat2.config.recompute import first_layers
from research.telechat2.config.sections import Settings, section_of
from research.telechat2.config.settings import DEFAULTS, model_config, with_defaults
from research.telechat2.plan.estimate.costs import NODE
from research.telechat2.plan.estimate.estimate import GB, Estimate, estimate_workload, limit_gb_of
from research.telechat2.plan.estimate.memory import stage_memory
from research.telechat2.plan.estimate.schedule import Schedule, schedule
from research.telechat2.plan.estimate.workload import Workload, workload, workload_of

MOST_CHUNKS = 4
Changes = dict[str, Any]  # dotted key to value


@dataclass(frozen=True)
class FoundPlan:
    """A plan: the settings in which it differs from the config, and its estimate."""

    changes: Changes
    estimate: Estimate

    def words(self) -> str:
        """The changes as words that telechat_plan.py reads as the same; "" where there are none."""
        words = [shlex.quote(f"{key}={value_word(value)}") for key, value in self.changes.items()]
        return f"--set {' '.join(words)}" if words else ""

    def as_dict(self) -> dict[str, object]:
        speed = self.estimate.throughput
        return {
            "changes": self.changes,
            "words": self.words(),
            "tokens_per_second": speed.tokens_per_second,
            "bubble": speed.bubble,
            "peak_bytes": self.estimate.peak_bytes,
        }

    def row(self) -> list[str]:
        run, speed = self.estimate.workload, self.estimate.throughput
        layers = sum(map(sum, run.recomputed))
        recomputed = [f"{layers} of {run.model.num_layers} layers"] if layers else []
        recomputed += ["select"] if any(map(any, run.selected)) else []
        split = (run.dp, run.mp, run.pp, run.gather * run.exchange, run.chunks, run.ep, run.micro_batches)
        return [
            f"{speed.tokens_per_second:,.0f}",
            f"{self.estimate.peak_bytes / GB:.1f}",
            f"{speed.bubble:.1%}",
            *map(str, split),
            " and ".join(recomputed) or "none",
        ]


_SPLIT = ("dp", "mp", "pp", "cp", "chunks", "ep", "micro-batches")
_HEAD = ["tokens/s/NPU", "GB", "bubble", *_SPLIT, "recomputed"]


@dataclass(frozen=True)
class SearchResult:
    """The best plans, and how many were looked at, of these illegal, and of the legal ones too large.

    ``broken``: of the illegal ones, the error that most of them have, but for its numbers. ``least_bytes``:
    what the smallest of those too large takes of the NPU that is fullest; None where there is none.
    ``batch``: sequences of a step, which every plan keeps.
    """

    plans: tuple[FoundPlan, ...]
    tried: int
    illegal: int
    too_large: int
    broken: str | None
    least_bytes: int | None
    batch: int

    def as_dict(self) -> dict[str, object]:
        return vars(self) | {"plans": [plan.as_dict() for plan in self.plans]}

    def table(self) -> str:
        counts = f"{self.tried} plans: {self.illegal} break a rule, {self.too_large} do not fit."
        if not self.plans:
            return " ".join([counts, *self._remedies()])
        words = self.plans[0].words()
        first = f"the first: {words}" if words else "the first is the config's own."
        return "\n".join([*table([_HEAD, *(plan.row() for plan in self.plans)]), "", counts, first])

    def _remedies(self) -> list[str]:
        """What to change where no plan is found."""
        if self.least_bytes:
            smallest = f"The smallest takes {self.least_bytes / GB:.1f} GB of an NPU, all layers recomputed: "
            return [smallest + "take more NPUs, or a smaller model or seq_length."]
        kept = f"All plans keep the global batch of {self.batch} sequences"
        if not self.broken:
            return [f"{kept}, which no split of these NPUs divides; change the batch or the number of NPUs."]
        larger = (
            f"{kept}; give a larger one by --set, parallel_config.micro_batch_num in a pipeline or "
            "runner_config.gradient_accumulation_steps without one, or take fewer NPUs."
        )
        found = [f"Most of them break this: {self.broken}"]
        return [*found, larger] if "micro_batch_num" in self.broken else found


def search(settings: Settings, device_num: int, memory_gb: float, count: int = 10) -> SearchResult:
    """The ``count`` fastest plans of a model that take at most ``memory_gb`` GB (10^9 bytes) of each NPU.

    ``settings`` are those of ``read_settings``; UsageError: they are not of a cluster, or not legal.
    """
    checked = check(settings)
    if checked.kind != "semi_auto":
        raise UsageError(
            "a search needs the config of a cluster, with use_parallel: True and parallel.parallel_mode: 1."
        )
    workload(settings)  # what is not estimated at all is refused here, not counted as a plan
    plan = with_defaults(settings, "parallel_config")
    model = model_config(settings, plan | {"vocab_emb_dp": False})
    own_limit = limit_gb_of(settings)
    plans, too_large, tried = [], [], 0
    broken: dict[str, list[str]] = {}  # errors, by their text without numbers
    for changes in _candidates(model, device_num, checked.global_batch):
        tried += 1
        try:
            run, changes = _fitted(model, settings, changes, memory_gb * GB)
        except UsageError as error:
            problem = problems_of(error)[0]
            broken.setdefault(re.sub(r"\d+", "", problem), []).append(problem)
            continue
        if isinstance(run, int):
            too_large.append(run)
            continue
        estimate = estimate_workload(run)
        if estimate.peak_bytes > own_limit * GB:
            changes = changes | {"context.max_device_memory": f"{memory_gb:g}GB"}
        plans.append(FoundPlan(_differences(changes, settings), estimate))
    plans.sort(key=lambda plan: -plan.estimate.throughput.tokens_per_second)
    return SearchResult(
        plans=tuple(plans[:count]),
        tried=tried,
        illegal=sum(map(len, broken.values())),
        too_large=len(too_large),
        broken=max(broken.values(), key=len)[0] if broken else None,
        least_bytes=min(too_large, default=None),
        batch=checked.global_batch,
    )


def _differences(changes: Changes, settings: Settings) -> Changes:
    missing = {"model.model_config.pp_interleave_num": 1, "model.model_config.offset": 0}
    found = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        default = DEFAULTS.get(section, {}).get(name, missing.get(key))
        if section_of(settings, section).get(name, default) != value:
            found[key] = value
    return found


def _candidates(model: ModelSettings, device_num: int, batch: int) -> Iterator[Changes]:
    """Every way to split the devices; whether it is legal is for others to say."""
    for dp, mp, pp, cp in _splits(model, device_num):
        steps, rest = divmod(batch, model.batch_size * dp)
        if rest:
            continue
        for chunks in range(1, MOST_CHUNKS + 1 if pp > 1 else 2):
            for ep in _divisors(model.moe.num_experts, of=dp) if model.moe else [1]:
                for selected in (False, True):
                    yield {
                        "parallel_config.data_parallel": dp,
                        "parallel_config.model_parallel": mp,
                        "parallel_config.pipeline_stage": pp,
                        "parallel_config.context_parallel": cp,
                        "parallel_config.expert_parallel": ep,
                        "parallel_config.micro_batch_num": steps if pp > 1 else 1,
                        "runner_config.gradient_accumulation_steps": 1 if pp > 1 else steps,
                        "parallel_config.use_seq_parallel": mp > 1,
                        "parallel_config.vocab_emb_dp": False,
                        "model.model_config.pp_interleave_num": chunks,
                        "model.model_config.offset": _offset(model.num_layers, pp, chunks),
                        "recompute_config.select_recompute": selected,
                        "recompute_config.select_comm_recompute": False,
                        "parallel.pipeline_config": _INTERLEAVED if chunks > 1 else None,
                        "recompute_config.recompute": False,
                    }


_INTERLEAVED = {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}


def _splits(model: ModelSettings, device_num: int) -> Iterator[tuple[int, int, int, int]]:
    """Data, tensor, pipeline and context parallelism whose product is ``device_num``."""
    for cp in sorted({1, model.parallel_config.context_parallel}):
        if device_num % cp:
            continue
        for mp in _divisors(min(device_num, NODE), of=device_num // cp):
            for pp in _divisors(model.num_layers, of=device_num // cp // mp):
                yield device_num // cp // mp // pp, mp, pp, cp


def _divisors(most: int, of: int) -> list[int]:
    return [number for number in range(1, min(most, of) + 1) if of % number == 0]


def _offset(layers: int, stages: int, chunks: int) -> list[int] | list[list[int]] | int:
    """Layers that do not divide go to the stages in the middle first, then to the last and the first one."""
    left = layers % (stages * chunks)
    if not left:
        return 0
    order = [*range(1, stages - 1), stages - 1, 0]
    table = [[0] * stages for _ in range(chunks)]
    for number in range(left):
        table[number // stages][order[number % stages]] += 1
    return table[0] if chunks == 1 else table


def _fitted(
    model: ModelSettings, settings: Settings, changes: Changes, limit: float
) -> tuple[Workload | int, Changes]:
    """The plan with as few layers recomputed as fit; where not even all suffice, the bytes it takes then."""
    run = _workload(model, settings, changes)
    unit = [[1.0] * run.pp for _ in range(run.chunks)]
    in_flight = schedule(unit, unit, run.micro_batches)  # as many whatever passes take
    layers = [sum(row[stage] for row in run.layers) for stage in range(run.pp)]
    numbers = []
    for stage, most in enumerate(layers):
        number = _fewest(run, stage, most, in_flight, limit)
        if number is None:
            return max(_bytes(run, layers, stage, in_flight) for stage in range(run.pp)), changes
        numbers.append(number)
    changes = changes | {"recompute_config.recompute": numbers if any(numbers) else False}
    return _workload(model, settings, changes), changes


def _fewest(run: Workload, stage: int, most: int, in_flight: Schedule, limit: float) -> int | None:
    """How many layers of a stage must be recomputed; None if not even ``most``, all of them, suffice."""

    def fits(number: int) -> bool:
        numbers = [0] * run.pp
        numbers[stage] = number
        return _bytes(run, numbers, stage, in_flight) <= limit

    if not fits(most):
        return 0 if fits(0) else None
    return bisect_left(range(most), True, key=fits)


def _bytes(run: Workload, numbers: list[int], stage: int, in_flight: Schedule) -> int:
    """What a device of a stage takes with so many layers of each stage recomputed."""
    recomputed = first_layers("recompute", numbers, run.layers)
    return stage_memory(replace(run, recomputed=recomputed), stage, in_flight).total


def _workload(model: ModelSettings, settings: Settings, changes: Changes) -> Workload:
    def changed(prefix: str) -> Changes:
        return {key[len(prefix) :]: value for key, value in changes.items() if key.startswith(prefix)}

    recompute = replace(model.parallel_config.recompute, **changed("recompute_config."))
    plan = replace(model.parallel_config, **changed("parallel_config."), recompute=recompute)
    model = replace(model, **changed("model.model_config."), parallel_config=plan)
    check_plan(model)
    parallel = section_of(settings, "parallel")
    check_cluster(model, devices_of(plan), parallel.get("gradients_mean", False))
    check_exchange(model, parallel.get("enable_alltoall", False))
    runner = section_of(settings, "runner_config") | changed("runner_config.")
    return workload_of(model, settings | {"runner_config": runner})
