"""The rules of learning rate, optimizer and length of a training: one check for the plan command and the run.

MindFormers 1.9 passes most of these over: a final rate above the first lets the rate climb, and of two
lengths of the warm-up one is not read.
"""

from collections.abc import Iterator
from math import isfinite

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all

_PEAKS = ("learning_rate", "base_lr")
_OF_MINDSPORE = (  # schedules of MindSpore itself, whose arguments are not known here
    "CosineDecayLR", "ExponentialDecayLR", "InverseDecayLR", "NaturalExpDecayLR", "PolynomialDecayLR",
    "WarmUpLR",
)  # fmt: skip
_TEMPLATE_RATE = 5e-5
_ENDS = ("lr_end", "lr_end1", "lr_end2", "eta_min")


MOST_EPOCHS = 2**31 - 1  # an int32


def check_optimization(settings: dict) -> None:
    """Check the numbers of ``lr_schedule``, ``optimizer``, ``runner_wrapper``, ``runner_config`` and
    ``checkpoint``, and of the schedules of parameter groups.

    Args:
        settings: of a YAML with its overrides; sections may be absent.

    Raises:
        UsageError: with the setting, its value, and what it must be.
    """
    _check_stated_rate(settings)
    scaled = bool(settings.get("lr_scale"))
    checks = []
    for name, schedule in _schedules(settings):
        checks += [(_check_rates, name, schedule, scaled), (_check_lengths, name, schedule)]
    checks += [(_check_optimizer, _section(settings, "optimizer")), (_check_runner, settings)]
    check_all(*checks)


def _check_runner(settings: dict) -> None:
    """Numbers of the run around schedule and optimizer."""
    wrapper = _section(settings, "runner_wrapper")
    if wrapper.get("use_clip_grad"):
        _positive("runner_wrapper.max_grad_norm", wrapper.get("max_grad_norm"))
    if not isinstance(wrapper.get("scale_sense"), dict):
        _positive("runner_wrapper.scale_sense", wrapper.get("scale_sense"))
    check_run_numbers(settings)
    for key in ("save_interleaved_steps", "save_max"):
        _count(f"checkpoint.{key}", _section(settings, "checkpoint").get(key))


def check_run_numbers(settings: dict) -> None:
    """Check the numbers that evaluations have too: of ``runner_config``, records, and the seed.

    Raises:
        UsageError: with the setting, its value, and what it must be.
    """
    runner = _section(settings, "runner_config")
    for key in ("epochs", "batch_size", "gradient_accumulation_steps"):
        _count(f"runner_config.{key}", runner.get(key))
    if (epochs := runner.get("epochs")) is not None and epochs > MOST_EPOCHS:
        raise UsageError(
            f"runner_config.epochs is {epochs:,}; MindSpore counts to {MOST_EPOCHS:,}. Lower it."
        )
    if runner.get("sink_size") != -1:  # all steps of an epoch
        _count("runner_config.sink_size", runner.get("sink_size"))
    for which in ("train_dataset", "eval_dataset"):
        loader = _section(_section(settings, which), "data_loader")
        _count(f"{which}.data_loader.num_samples", loader.get("num_samples"))
    check_seed(settings.get("seed"))


def check_seed(seed, name: str = "seed") -> None:
    """UsageError if ``seed``, called ``name``, is none that NumPy takes; None is none given."""
    if seed is not None and not (_whole(seed) and 0 <= seed < 2**32):
        raise UsageError(f"{name} is {seed!r}; it must be a whole number from 0 to {2**32 - 1}.")


def check_schedule_length(settings: dict, steps: int) -> list[str]:
    """Compare the schedule with the length of the run, once that is known.

    Args:
        settings: of a YAML with its overrides, checked by ``check_optimization``.
        steps: that the whole run has, from its first.

    Returns:
        What is legal and rarely meant; sentences.

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
            notes.append(
                f"{name}: the warm-up takes {warmup} steps and the run has {steps}, so {_peak(schedule)[0]} "
                f"{_peak(schedule)[1]} is never reached; lower warmup_steps or warmup_ratio, or train longer."
            )
        if total != steps:
            what = "stays at its end after that" if total < steps else "does not reach its end"
            notes.append(
                f"{name}.total_steps is {total}, and the run has {steps} steps: the learning rate {what}. "
                "-1 takes the steps of the run."
            )
    return notes


def with_float_fields(optimizer: dict) -> dict:
    """The optimizer's settings with the fields that MindFormers refuses as whole numbers, such as
    ``weight_decay: 0``, as floats."""
    fields = {key: optimizer[key] for key in ("eps", "weight_decay") if _whole(optimizer.get(key))}
    return optimizer | {key: float(value) for key, value in fields.items()}


def _schedules(settings: dict) -> Iterator[tuple[str, dict]]:
    """The learning rate schedules of a run, by their names."""
    grouped = _section(settings, "grouped_lr_schedule")
    if not grouped:
        if schedule := _section(settings, "lr_schedule"):
            yield "lr_schedule", schedule
        return
    yield "grouped_lr_schedule.default", _section(grouped, "default")
    for number, schedule in enumerate(grouped.get("grouped") or []):
        if isinstance(schedule, dict):
            yield f"grouped_lr_schedule.grouped[{number}]", schedule


def _peak(schedule: dict) -> tuple[str, object]:
    """The name and the value of a schedule's highest rate."""
    return next(((key, schedule[key]) for key in _PEAKS if schedule.get(key) is not None), ("", None))


def _check_stated_rate(settings: dict) -> None:
    """Refuse a run whose rate nobody states, and a rate of the optimizer that is not the schedule's.

    Where there is no schedule MindFormers' template fills one in, and a schedule replaces
    ``optimizer.learning_rate``.
    """
    trains = settings.get("run_mode") in ("train", "finetune")
    given = _section(settings, "optimizer").get("learning_rate")
    schedules = list(_schedules(settings))
    for name, schedule in schedules or [("lr_schedule", {})] if trains else []:
        unknown = schedule.get("type") in _OF_MINDSPORE or "auto_register" in schedule
        if _peak(schedule)[1] is None and not unknown:
            rate = given if _is_rate(given) else "RATE"
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
                f"instead; give --{name}.{key} {given if _is_rate(given) else 'RATE'}, or leave "
                "optimizer.learning_rate out (null)."
            )


def _is_rate(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_rates(name: str, schedule: dict, scaled: bool) -> None:
    for key in (*_PEAKS, *_ENDS, "warmup_lr_init"):
        _number(f"{name}.{key}", schedule.get(key), "0 or more", lambda value: value >= 0)
    _number(f"{name}.num_cycles", schedule.get("num_cycles"), "above 0", lambda value: value > 0)
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


def _check_lengths(name: str, schedule: dict) -> None:
    for phase in ("warmup", "decay", "decay_start"):
        steps, ratio = f"{phase}_steps", f"{phase}_ratio"
        length, share = schedule.get(steps), schedule.get(ratio)
        if length is not None and not (_whole(length) and length >= 0):
            raise UsageError(f"{name}.{steps} is {length!r}; it must be a whole number, 0 or more.")
        _number(f"{name}.{ratio}", share, "from 0 to 1", lambda value: 0 <= value <= 1)
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
    whole = _whole(total) or (isinstance(total, float) and total.is_integer())
    if total not in (None, -1) and not (whole and total >= 1):
        raise UsageError(
            f"{name}.total_steps is {total!r}; it must be -1, for all steps of the run, or at least 1."
        )


def _check_optimizer(optimizer: dict) -> None:
    betas = optimizer.get("betas")
    if betas is not None:
        if not (isinstance(betas, (list, tuple)) and len(betas) == 2):
            raise UsageError(f"optimizer.betas is {betas!r}; it must be two numbers, such as [0.9, 0.95].")
        for index, beta in enumerate(betas):
            _number(f"optimizer.betas[{index}]", beta, "between 0 and 1", lambda value: 0 < value < 1)
    eps = optimizer.get("eps")
    for index, value in enumerate(eps if isinstance(eps, (list, tuple)) else [eps]):  # CAME has several
        _positive("optimizer.eps" + (f"[{index}]" if isinstance(eps, (list, tuple)) else ""), value)
    _number("optimizer.weight_decay", optimizer.get("weight_decay"), "0 or more", lambda value: value >= 0)
    _number("optimizer.learning_rate", optimizer.get("learning_rate"), "0 or more", lambda value: value >= 0)


def _section(settings: dict, name: str) -> dict:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(name: str, value) -> None:
    if value is not None and not (_whole(value) and value >= 1):
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def _positive(name: str, value) -> None:
    _number(name, value, "above 0", lambda number: number > 0)


def _number(name: str, value, expected: str, holds) -> None:
    """Refuse what is no finite number, or not in its range; an absent one has its default."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise UsageError(f"{name} is {value!r}; it must be a number {expected}.")
    if not holds(value):
        raise UsageError(f"{name} is {value!r}; it must be {expected}.")
