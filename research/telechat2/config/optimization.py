"""The rules of learning rate, optimizer and length of a training; MindFormers 1.9 passes most over."""

from collections.abc import Iterator

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.classes import GROUPS
from research.telechat2.config.kinds import check_number, is_number, is_whole
from research.telechat2.config.sections import Settings, section_of

_PEAKS = ("learning_rate", "base_lr")
_ENDS = ("lr_end", "lr_end1", "lr_end2", "eta_min")
_TEMPLATE_RATE = 5e-5


def check_optimization(settings: Settings) -> None:
    """UsageError for a number of schedules, optimizer, ``runner_wrapper``, ``runner_config`` or
    ``checkpoint`` that cannot be; sections may be absent."""
    _check_stated_rate(settings)
    scaled = bool(settings.get("lr_scale"))
    checks: list[tuple[object, ...]] = []
    for name, schedule in _schedules(settings):
        checks += [(_check_rates, name, schedule, scaled), (_check_lengths, name, schedule)]
    check_all(*checks, (_check_optimizer, section_of(settings, "optimizer")), (_check_runner, settings))


def _check_runner(settings: Settings) -> None:
    """Numbers of the run around schedule and optimizer."""
    wrapper = section_of(settings, "runner_wrapper")
    if wrapper.get("use_clip_grad"):
        _check("runner_wrapper", wrapper, "max_grad_norm", above=0)
    if not isinstance(wrapper.get("scale_sense"), dict):
        _check("runner_wrapper", wrapper, "scale_sense", above=0)
    check_run_numbers(settings)
    _check_counts(settings, "checkpoint", "save_interleaved_steps", "save_max")


def check_run_numbers(settings: Settings) -> None:
    """UsageError for a number that evaluations have too: of ``runner_config``, records, and the seed."""
    runner = section_of(settings, "runner_config")
    _check(
        "runner_config", runner, "epochs", whole=True, least=1, most=2**31 - 1
    )  # MindSpore counts in int32
    _check_counts(settings, "runner_config", "batch_size", "gradient_accumulation_steps")
    if runner.get("sink_size") != -1:  # all steps of an epoch
        _check_counts(settings, "runner_config", "sink_size")
    for which in ("train_dataset", "eval_dataset"):
        _check_counts(settings, f"{which}.data_loader", "num_samples")
    check_seed(settings.get("seed"))


def check_seed(seed: object, name: str = "seed") -> None:
    """UsageError if ``seed``, called ``name``, is none that NumPy takes; None is none given."""
    if seed is not None:
        check_number(name, seed, whole=True, least=0, most=2**32 - 1)


def check_schedule_length(settings: Settings, steps: int) -> list[str]:
    """Notes on schedules that do not fit a whole run of ``steps``, once these are known.

    Raises:
        UsageError: the rate of the first step would be NaN.
    """
    notes = []
    for name, schedule in _schedules(settings):
        total = schedule.get("total_steps")
        total = steps if total in (None, -1) else total
        warmup = schedule.get("warmup_steps") or 0
        if (ratio := schedule.get("warmup_ratio")) is not None:
            warmup = int(total * ratio)
        if schedule.get("type") == "WarmUpStableDecayLR" and warmup == 0:
            raise UsageError(
                f"{name}: WarmUpStableDecayLR of MindFormers 1.9 divides by 0 in a first step without "
                f"warm-up (warmup_steps {schedule.get('warmup_steps')}, warmup_ratio {ratio} of {total} "
                f"steps); give --{name}.warmup_ratio null --{name}.warmup_steps 1 or more."
            )
        if warmup >= steps and warmup > 1:
            peak_name, peak = _peak(schedule)
            notes.append(
                f"{name}: the warm-up takes {warmup} steps and the run has {steps}, so {peak_name} {peak} is "
                "never reached; lower warmup_steps or warmup_ratio, or train longer."
            )
        if total != steps:
            what = "stays at its end after that" if total < steps else "does not reach its end"
            notes.append(
                f"{name}.total_steps is {total}, and the run has {steps} steps: the learning rate {what}. -1 "
                "takes the steps of the run."
            )
    return notes


def with_float_fields(optimizer: Settings) -> Settings:
    """The optimizer with floats for ``weight_decay: 0`` and the like, which MindFormers refuses."""
    fields = {key: optimizer[key] for key in ("eps", "weight_decay") if is_whole(optimizer.get(key))}
    return optimizer | {key: float(value) for key, value in fields.items()}


def _schedules(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """The learning rate schedules of a run, by their names."""
    grouped = section_of(settings, "grouped_lr_schedule")
    if not grouped:
        if schedule := section_of(settings, "lr_schedule"):
            yield "lr_schedule", schedule
        return
    yield "grouped_lr_schedule.default", section_of(grouped, "default")
    for number, schedule in enumerate(grouped.get("grouped") or []):
        if isinstance(schedule, dict):
            yield f"grouped_lr_schedule.grouped[{number}]", schedule


def _peak(schedule: Settings) -> tuple[str, float | None]:
    """The name and the value of a schedule's highest rate."""
    return next(((key, schedule[key]) for key in _PEAKS if schedule.get(key) is not None), ("", None))


def _check_stated_rate(settings: Settings) -> None:
    """Refuse a run without a stated rate, and a rate of the optimizer that is not the schedule's.

    Where there is no schedule MindFormers' template fills one in, and a schedule replaces
    ``optimizer.learning_rate``.
    """
    trains = settings.get("run_mode") in ("train", "finetune")
    given = section_of(settings, "optimizer").get("learning_rate")
    rate = given if is_number(given) else "RATE"
    schedules = list(_schedules(settings))
    for name, schedule in schedules or [("lr_schedule", {})] if trains else []:
        kind = schedule.get("type")
        unknown = "auto_register" in schedule or (kind and GROUPS["lr_schedule"].get(kind) is None)
        if _peak(schedule)[1] is None and not unknown:
            instead = "" if schedule else f" (MindFormers would take a cosine from {_TEMPLATE_RATE})"
            raise UsageError(
                f"{name}.learning_rate is not stated{instead}; give --{name}.learning_rate {rate}. That of "
                "the optimizer is not read."
            )
    for name, schedule in schedules[:1]:
        key, peak = _peak(schedule)
        if given is not None and peak is not None and given != peak:
            raise UsageError(
                f"optimizer.learning_rate is {given}, but {name}.{key} {peak} counts; give --{name}.{key} "
                f"{rate}, or leave optimizer.learning_rate out (null)."
            )


def _check_rates(name: str, schedule: Settings, scaled: bool) -> None:
    for key in (*_PEAKS, *_ENDS, "warmup_lr_init"):
        _check(name, schedule, key, least=0)
    _check(name, schedule, "num_cycles", above=0)
    rates = [schedule.get(key) for key in _PEAKS]
    if None not in rates and rates[0] != rates[1]:
        raise UsageError(
            f"{name} has learning_rate {rates[0]} and base_lr {rates[1]}, which alone is read; give "
            f"--{name}.base_lr, and --{name}.learning_rate null."
        )
    peak_name, peak = _peak(schedule)
    if peak is None or scaled:  # lr_scale multiplies the rate, by the batch size
        return
    for key in (*_ENDS, "warmup_lr_init"):
        value = schedule.get(key)
        if value is not None and value > peak:
            raise UsageError(
                f"{name}.{key} is {value}, above {peak_name} {peak}; give --{name}.{key} {peak / 10:.4g} or "
                f"another value up to {peak}, or raise {peak_name}."
            )


def _check_lengths(name: str, schedule: Settings) -> None:
    for phase in ("warmup", "decay", "decay_start"):
        steps, ratio = f"{phase}_steps", f"{phase}_ratio"
        length, share = schedule.get(steps), schedule.get(ratio)
        _check(name, schedule, steps, whole=True, least=0)
        _check(name, schedule, ratio, least=0, most=1)
        if length is not None and share is not None and (length or share):
            raise UsageError(
                f"{name} has {steps} {length} and {ratio} {share}; give one of the two: --{name}.{ratio} "
                f"null to take the steps, --{name}.{steps} null to take the ratio."
            )
    if epochs := schedule.get("warmup_epochs"):
        raise UsageError(
            f"{name}.warmup_epochs {epochs!r} is not followed; give warmup_steps or warmup_ratio instead."
        )
    total = schedule.get("total_steps")
    if total not in (None, -1) and not (is_number(total) and total == int(total) and total >= 1):
        raise UsageError(
            f"{name}.total_steps is {total!r}; it must be -1, the steps of the run, or at least 1."
        )


def _check_optimizer(optimizer: Settings) -> None:
    if (betas := optimizer.get("betas")) is not None:
        if not (isinstance(betas, (list, tuple)) and len(betas) == 2):
            raise UsageError(f"optimizer.betas is {betas!r}; it must be two numbers, such as [0.9, 0.95].")
        for index, beta in enumerate(betas):
            check_number(f"optimizer.betas[{index}]", beta, above=0, below=1)
    eps = optimizer.get("eps")
    for value in eps if isinstance(eps, (list, tuple)) else [eps]:  # CAME has several
        _check("optimizer", {"eps": value}, "eps", above=0)
    for key in ("weight_decay", "learning_rate"):
        _check("optimizer", optimizer, key, least=0)


def _check_counts(settings: Settings, place: str, *keys: str) -> None:
    for key in keys:
        _check(place, section_of(settings, place), key, whole=True, least=1)


def _check(place: str, section: Settings, key: str, *, whole: bool = False, **bounds: float) -> None:
    """check_number for a key of the section at ``place``; an absent one has its default."""
    if (value := section.get(key)) is not None:
        check_number(f"{place}.{key}", value, whole=whole, **bounds)
