"""The rules of learning rate, optimizer and length of a training: one check for the plan command and the run.

MindFormers 1.9 passes most of these over: a final rate above the first lets the rate climb, and of two
lengths of the warm-up one is not read.
"""

from collections.abc import Iterator

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.classes import GROUPS
from research.telechat2.config.kinds import check_number, is_number, is_whole
from research.telechat2.config.sections import Settings, section_of

_PEAKS = ("learning_rate", "base_lr")
_ENDS = ("lr_end", "lr_end1", "lr_end2", "eta_min")
_TEMPLATE_RATE = 5e-5
MOST_EPOCHS = 2**31 - 1  # an int32


def check_optimization(settings: Settings) -> None:
    """Check the numbers of ``lr_schedule``, ``optimizer``, ``runner_wrapper``, ``runner_config`` and
    ``checkpoint``, and of the schedules of parameter groups.

    Args:
        settings: of a YAML with its overrides; sections may be absent.

    Raises:
        UsageError: with the setting, its value, and what it must be.
    """
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
    for key in ("save_interleaved_steps", "save_max"):
        _check_count(settings, "checkpoint", key)


def check_run_numbers(settings: Settings) -> None:
    """Check the numbers that evaluations have too: of ``runner_config``, records, and the seed.

    Raises:
        UsageError: with the setting, its value, and what it must be.
    """
    _check_count(settings, "runner_config", "epochs", MOST_EPOCHS)  # MindSpore counts no further
    for key in ("batch_size", "gradient_accumulation_steps"):
        _check_count(settings, "runner_config", key)
    if section_of(settings, "runner_config").get("sink_size") != -1:  # all steps of an epoch
        _check_count(settings, "runner_config", "sink_size")
    for which in ("train_dataset", "eval_dataset"):
        _check_count(settings, f"{which}.data_loader", "num_samples")
    check_seed(settings.get("seed"))


def check_seed(seed: object, name: str = "seed") -> None:
    """UsageError if ``seed``, called ``name``, is none that NumPy takes; None is none given."""
    if seed is not None:
        check_number(name, seed, whole=True, least=0, most=2**32 - 1)


def check_schedule_length(settings: Settings, steps: int) -> list[str]:
    """Compare the schedule with the length of the run, once that is known.

    Args:
        settings: of a YAML with its overrides, checked by ``check_optimization``.
        steps: that the whole run has, from its first.

    Returns:
        Notes on what is legal and rarely meant.

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
                f"{name}.total_steps is {total}, and the run has {steps} steps: the learning rate {what}. "
                "-1 takes the steps of the run."
            )
    return notes


def with_float_fields(optimizer: Settings) -> Settings:
    """The optimizer's settings with the fields that MindFormers refuses as whole numbers, such as
    ``weight_decay: 0``, as floats."""
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
                f"{name}.learning_rate is not stated{instead}; give --{name}.learning_rate {rate}. A "
                "learning_rate of the section optimizer is not read."
            )
    for name, schedule in schedules[:1]:
        key, peak = _peak(schedule)
        if given is not None and peak is not None and given != peak:
            raise UsageError(
                f"optimizer.learning_rate is {given} and {name}.{key} is {peak}, which MindFormers takes "
                f"instead; give --{name}.{key} {rate}, or leave optimizer.learning_rate out (null)."
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
            course = "falls to the learning rate in the warm-up" if key == "warmup_lr_init" else "climbs"
            raise UsageError(
                f"{name}.{key} is {value}, which is above {peak_name} {peak}, so the rate {course}; give "
                f"--{name}.{key} {peak / 10:.4g} or another value up to {peak}, or raise {peak_name}."
            )


def _check_lengths(name: str, schedule: Settings) -> None:
    for phase in ("warmup", "decay", "decay_start"):
        steps, ratio = f"{phase}_steps", f"{phase}_ratio"
        length, share = schedule.get(steps), schedule.get(ratio)
        _check(name, schedule, steps, whole=True, least=0)
        _check(name, schedule, ratio, least=0, most=1)
        if length is not None and share is not None and (length or share):
            raise UsageError(
                f"{name} has {steps} {length} and {ratio} {share}, and MindFormers reads the ratio alone; "
                f"give one of the two: --{name}.{ratio} null to take the steps, --{name}.{steps} null to "
                "take the ratio."
            )
    if epochs := schedule.get("warmup_epochs"):
        raise UsageError(
            f"{name}.warmup_epochs is {epochs!r}, which MindFormers 1.9 reads and then replaces by "
            "warmup_ratio; give warmup_steps or warmup_ratio."
        )
    total = schedule.get("total_steps")
    if total not in (None, -1) and not (is_number(total) and total == int(total) and total >= 1):
        raise UsageError(
            f"{name}.total_steps is {total!r}; it must be -1, for all steps of the run, or at least 1."
        )


def _check_optimizer(optimizer: Settings) -> None:
    betas = optimizer.get("betas")
    if betas is not None:
        if not (isinstance(betas, (list, tuple)) and len(betas) == 2):
            raise UsageError(f"optimizer.betas is {betas!r}; it must be two numbers, such as [0.9, 0.95].")
        for index, beta in enumerate(betas):
            check_number(f"optimizer.betas[{index}]", beta, above=0, below=1)
    eps = optimizer.get("eps")
    for value in eps if isinstance(eps, (list, tuple)) else [eps]:  # CAME has several
        _check("optimizer", {"eps": value}, "eps", above=0)
    for key in ("weight_decay", "learning_rate"):
        _check("optimizer", optimizer, key, least=0)


def _check_count(settings: Settings, place: str, key: str, most: int | None = None) -> None:
    _check(place, section_of(settings, place), key, whole=True, least=1, most=most)


def _check(
    place: str,
    section: Settings,
    key: str,
    *,
    whole: bool = False,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> None:
    """check_number for a key of the section at ``place``; an absent one has its default."""
    if (value := section.get(key)) is not None:
        check_number(f"{place}.{key}", value, whole=whole, least=least, most=most, above=above)
