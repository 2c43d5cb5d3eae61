"""Whether a run can go on where another stopped: its files, its data, its position, its schedule.

MindFormers 1.9 takes any data and any batch, rescales the step, and trains with fresh moments where the
optimizer's file is missing.
"""

import json
import re
from pathlib import Path

from research.telechat2.checkpoint.loading import NO_WEIGHTS
from research.telechat2.checkpoint.storage.safetensors_format import read_safetensors
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import read_json
from research.telechat2.run.training_record import NAME, TrainingRecord, read_record

COMMON = "common.json"
_WITHOUT = "Leave out --resume_training to start a new run from these weights, at step 1 of its own schedule."
_MOMENTS = ("adam_m.", "adam_v.")  # of MindFormers' AdamW and its fused forms


def check_resumption(saved: TrainingRecord | None, common: dict, now: TrainingRecord) -> list[str]:
    """Compare the run that is to go on with the one that saved the checkpoint.

    Args:
        saved: what the checkpoint says of its run; None where nothing is recorded.
        common: ``step_num``, ``epoch_num`` and ``global_batch_size`` of its ``common.json``; each None for
            the older format, which holds them as tensors.
        now: the run that is about to start.

    Returns:
        What the user should know: the position, and settings that change from here on.

    Raises:
        UsageError: with all that differs and would give the next steps other records or other moments.
    """
    step = common["step_num"]
    if differing := _differing(saved, common, now):
        listed = "\n".join(f"  {line}" for line in differing)
        raise UsageError(f"cannot resume{_after(step)}:\n{listed}\nGive these as they were. {_WITHOUT}")
    total = now.total_steps
    if None not in (step, total) and step >= total:
        raise UsageError(
            f"nothing is left to train: the checkpoint is of step {step}, and {now.epochs} epochs of "
            f"{now.steps_per_epoch} steps are {total}. Raise --runner_config.epochs, which also makes the "
            f"schedule of the learning rate longer. {_WITHOUT}"
        )
    return [*_position(step, now), *_changes(saved, now)]


def _after(step: int | None) -> str:
    return "" if step is None else f" after step {step}"


def _differing(saved: TrainingRecord | None, common: dict, now: TrainingRecord) -> list[str]:
    """What was otherwise, and moves the position in the data; ``name: before -> now``."""
    if saved is None:
        return _differing_by_numbers(common, now)
    lines = []
    if None not in (saved.data, now.data) and saved.data != now.data:
        before, after = (f"{run.records} records, hash {run.data[:12]}" for run in (saved, now))
        lines.append(f"data: {before} -> {after}")
    elif None not in (saved.records, now.records) and saved.records != now.records:
        lines.append(f"records of an epoch (num_samples): {saved.records} -> {now.records}")
    for name, title in (
        ("steps_per_epoch", "steps of an epoch"),
        ("global_batch_size", "records of a step (batch_size, times devices and accumulated batches)"),
        ("seed", "seed"),
        ("shuffle", "train_dataset.data_loader.shuffle"),
    ):
        before, after = getattr(saved, name), getattr(now, name)
        if before != after and not (name == "steps_per_epoch" and None in (before, after)):
            lines.append(f"{title}: {before} -> {after}")
    before, after = saved.optimizer.get("type"), now.optimizer.get("type")
    if before != after:
        lines.append(f"optimizer.type, whose states are of another kind: {before} -> {after}")
    return lines + _within_a_sink(common["step_num"], now)


def _differing_by_numbers(common: dict, now: TrainingRecord) -> list[str]:
    """What ``common.json`` alone can tell: the batch, and that the epoch fits the step."""
    lines = []
    step, epoch, batch = common["step_num"], common["epoch_num"], common["global_batch_size"]
    if batch not in (None, now.global_batch_size):
        lines.append(f"records of a step: {batch} -> {now.global_batch_size}")
    sink = now.sink_size or 1
    per_epoch = now.steps_per_epoch
    if None not in (per_epoch, step, epoch) and epoch not in (-(-step // per_epoch), -(-step // sink), step):
        expected = f"of {per_epoch} steps each it is in epoch {-(-step // per_epoch)}"
        lines.append(f"steps of an epoch: step {step} was in epoch {epoch}; {expected}")
    return lines + _within_a_sink(step, now)


def _within_a_sink(step: int | None, now: TrainingRecord) -> list[str]:
    if step and now.sink_size and step % now.sink_size:
        return [f"runner_config.sink_size: {now.sink_size}, and step {step} lies within a sink"]
    return []


def _position(step: int | None, now: TrainingRecord) -> list[str]:
    if None in (step, now.steps_per_epoch):
        return [f"resuming{_after(step)}; the position is compared when the data is open"]
    epoch, done = divmod(step, now.steps_per_epoch)
    place = f"at epoch {epoch + 1}, step {done + 1} of {now.steps_per_epoch}"
    return [f"resuming after step {step} of {now.total_steps}: {place}"]


def _changes(saved: TrainingRecord | None, now: TrainingRecord) -> list[str]:
    """Settings that may differ, and do: each with what it changes."""
    if saved is None:
        return [
            f"the checkpoint has no {NAME}, so these are not compared: the data, its order (seed {now.seed}, "
            f"shuffle {now.shuffle}), the schedule, the optimizer's settings"
        ]
    notes = []
    before, total = saved.total_steps, now.total_steps
    if None not in (before, total) and before != total and now.lr_schedule.get("total_steps") in (None, -1):
        follows = "the learning rate follows the longer or shorter schedule from here on"
        notes.append(f"the run had {before} steps and has {total} now: {follows}")
    if saved.devices != now.devices:
        notes.append(f"devices: {saved.devices} -> {now.devices}, with as many records in a step")
    notes += _changed_settings(saved, now)
    if None in (saved.data, now.data):
        notes.append("the data is not compared: it is no set of MindRecord files")
    return notes


def _changed_settings(saved: TrainingRecord, now: TrainingRecord) -> list[str]:
    """Settings whose values differ, with both."""
    pairs = [(f"{name}.", getattr(saved, name), getattr(now, name)) for name in ("lr_schedule", "optimizer")]
    if None not in (saved.others, now.others):
        pairs.append(("", saved.others, now.others))
    notes = []
    for prefix, *both in pairs:
        before, after = map(_plain, both)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                notes.append(f"{prefix}{key}: {before.get(key)} -> {after.get(key)}, from this step on")
    return notes


def _plain(section: dict) -> dict:
    """A section as JSON keeps it, without keys that are None."""
    kept = json.loads(json.dumps(section, default=str))
    return {key: value for key, value in kept.items() if value is not None}


def initial_epoch(step: int, steps_in_epoch: int, sink_size: int) -> int:
    """The number that ``Model.train`` starts counting at: whole epochs done, or whole sinks in sink mode."""
    return step // sink_size if sink_size else step // steps_in_epoch


def read_iteration(folder: Path) -> tuple[dict, TrainingRecord | None]:
    """The ``common.json`` and the record of an ``iteration_*`` folder of which all files are whole.

    Raises:
        UsageError: a file is missing or broken, with the latest iteration beside it that is whole.
    """
    try:
        return _read_iteration(folder)
    except UsageError as error:
        raise UsageError(f"cannot resume from {folder}: {error}\n{_instead(folder)}") from error


def _read_iteration(folder: Path) -> tuple[dict, TrainingRecord | None]:
    common = _read_common(folder)
    number = re.fullmatch(r"iteration_0*(\d+)", folder.name)
    if number and int(number[1]) != common["step_num"]:
        raise UsageError(f"its {COMMON} is of step {common['step_num']}; copy all files of one iteration.")
    weights = {name for name in _names_of(folder, "model") if not name.endswith(NO_WEIGHTS)}
    states = _names_of(folder, "opt")
    for prefix in _MOMENTS:
        moments = {name.removeprefix(prefix) for name in states if name.startswith(prefix)}
        missing = sorted(weights - moments)
        if moments and missing:
            number = f"{len(missing)} of {len(weights)} parameters have none"
            raise UsageError(f"the optimizer's files hold no {prefix}{missing[0]} ({number}).")
    return common, read_record(folder)


def _read_common(folder: Path) -> dict:
    if (common := read_json(folder / COMMON)) is None:
        raise UsageError(f"{COMMON} is missing, which holds the number of steps done.")
    numbers = {name: common.get(name) for name in ("step_num", "epoch_num", "global_batch_size")}
    if not all(isinstance(value, int) and value >= 1 for value in numbers.values()):
        raise UsageError(f"{COMMON} holds {numbers}; expected whole numbers of at least 1.")
    return common


def _names_of(folder: Path, kind: str) -> set[str]:
    """The tensors in the files of a kind, ``model`` or ``opt``, of all processes that saved."""
    what = "weights" if kind == "model" else "optimizer's states"
    pattern = re.compile(rf"(?:.*-)?{kind}-(\d{{7}})-(\d{{7}})\.safetensors")
    files = {path: match for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))}
    if not files:
        hint = "" if kind == "model" else " (none is saved with checkpoint.no_save_optim: True)"
        raise UsageError(f"the file of the {what} is missing: *-{kind}-0000000-0000001.safetensors{hint}.")
    here = {int(match[1]) for match in files.values()}
    total = {int(match[2]) for match in files.values()}
    missing = sorted(set(range(max(total))) - here)
    if missing or len(total) > 1:
        raise UsageError(
            f"{len(files)} files of the {what} are there, expected {max(total)}: number "
            f"{missing[0] if missing else sorted(total)} is missing or of another run."
        )
    return {tensor.name for path in files for tensor in read_safetensors(path)}


def _instead(folder: Path) -> str:
    """What to do where an iteration is broken."""
    for other in whole_iterations(folder.parent):
        if other.resolve() != folder.resolve():
            return (
                f"{other.name} beside it is whole: give --load_checkpoint {other}, and delete {folder.name} "
                "or give another --output_dir. Or leave out --resume_training to start from weights alone."
            )
    return "Copy the missing file again, or leave out --resume_training to start from the weights alone."


def whole_iterations(folder: Path) -> list[Path]:
    """The iterations in a ``checkpoint`` folder that can be resumed from, the latest first."""
    whole = []
    for path in sorted(folder.glob("iteration_*/"), reverse=True):
        try:
            _read_iteration(path)
        except (UsageError, OSError):
            continue
        whole.append(path)
    return whole
