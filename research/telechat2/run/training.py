"""A training from its checked settings to its end: locked, resumed at the right record, interruptible."""

import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from research.telechat2.checkpoint.table import expand
from research.telechat2.common.errors import UsageError
from research.telechat2.common.interrupts import interrupted
from research.telechat2.config.optimization import check_schedule_length
from research.telechat2.run.end import saved_checkpoint
from research.telechat2.run.load_checkpoint import known_sizes, prepare_checkpoint
from research.telechat2.run.lock import only_training_in
from research.telechat2.run.processes import device_num, is_first_process, on_cpu
from research.telechat2.run.resuming import check_resumption, read_iteration, whole_iterations
from research.telechat2.run.save_checkpoint import (
    checkpoint_folder,
    record_config,
    record_prompt_format,
    refuse_overwriting,
)
from research.telechat2.run.space import (
    check_space,
    checkpoint_bytes,
    free_bytes,
    gigabytes,
    kept_checkpoints,
)
from research.telechat2.run.stopping import StopRequest, resuming_command, stopping
from research.telechat2.run.training_record import TrainingRecord, describe_training, read_record


@dataclass
class Training:
    """A training that is under way.

    Attributes:
        record: to be saved beside its checkpoints.
        stop: whether it was asked to stop.
        check: of a run that resumes: ``check(record, step, batch)`` raises UsageError unless the complete
            ``record`` goes on at MindFormers' ``step``, with ``batch`` records of a step.
    """

    record: TrainingRecord
    stop: StopRequest
    check: Callable[[TrainingRecord, int, int], None] | None = None

    def open(self, steps_per_epoch: int, batch: int, step: int, factor: float | None) -> None:
        """Complete the record by what MindFormers knows once it has opened the data.

        Args:
            steps_per_epoch: of the data.
            batch: records of a step.
            step: after which MindFormers goes on.
            factor: by which it has multiplied the steps done, for another batch.
        """
        self.record = replace(self.record, steps_per_epoch=steps_per_epoch, global_batch_size=batch)
        if self.check:
            self.check(self.record, step, round(batch * (factor or 1.0)))


def train(
    config: dict,
    files: Mapping[Path, int | None],
    carry_out: Callable[[Path | None, Training], object],
    weights: str | None = None,
) -> None:
    """Train, alone in the output folder; Ctrl-C ends it with a checkpoint.

    Args:
        config: the checked settings.
        files: the data, see ``check_dataset``.
        carry_out: runs the Trainer, with what our own reader loads.
        weights: what the user gave to begin with; None: random weights.

    Raises:
        UsageError: another training writes there; what cannot be resumed; no room for a checkpoint.
        KeyboardInterrupt: after Ctrl-C, with what is saved and the command that resumes.
    """
    first = is_first_process()
    alone = not config.get("use_parallel") or ("MS_ROLE" not in os.environ and device_num() == 1)
    with _locked(config) if first else nullcontext(), stopping(alone) as stop:
        try:
            source = prepare_checkpoint(config, training=True)
            refuse_overwriting(config)
            record_config(config, weights, files)
            record_prompt_format(config)
            training = Training(describe_training(config, files if first else {}), stop)
            if first:
                _look_ahead(config, training)
            carry_out(source, training)
        except BaseException as error:
            if interrupted() or isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(farewell(config, stop, sys.argv)) from None
            if getattr(error, "errno", None) == errno.ENOSPC:
                output = Path(config["output_dir"])
                raise OSError(
                    f"the disk of {error.filename or output} is full, {gigabytes(free_bytes(output))} are "
                    f"free: {error}. Make room, or give another --output_dir."
                ) from error
            raise
        if stop.by_launcher:
            print(farewell(config, stop, sys.argv), flush=True)
            sys.exit(0)  # the launcher, which was interrupted, returns 130
        if stop.requested:
            raise KeyboardInterrupt(farewell(config, stop, sys.argv))


@contextmanager
def _locked(config: dict) -> Iterator[None]:
    """Hold the output folder, and that of the checkpoints where it lies elsewhere."""
    output, saves = Path(config["output_dir"]), checkpoint_folder(config)
    with ExitStack() as stack:
        for folder in [output] if saves.is_relative_to(output.absolute()) else [output, saves]:
            stack.enter_context(only_training_in(folder))
        yield


def leave_sinks_on_cpus(config: dict) -> None:
    """Turn sink mode off on CPUs: MindSpore feeds step by step there, but MindFormers counts by sinks."""
    runner = config.get("runner_config") or {}
    if runner.get("sink_mode", True) and on_cpu(config):
        print("runner_config.sink_mode: off, a CPU has no data sinks", flush=True)
        config["runner_config"] = runner | {"sink_mode": False}


def _look_ahead(config: dict, training: Training) -> None:
    """Check where the run starts, how long it is, and whether its checkpoints fit on the disk."""
    if config.get("resume_training"):
        training.check = _check_position(config, training.record)
    steps = training.record.total_steps
    _check_sinks(training.record)
    for note in check_schedule_length(config, steps) if steps else []:
        print(f"note: {note}", flush=True)
    if sizes := known_sizes(config):
        parameters = sum(prod(weight.shape) for weight in expand(sizes))
        warning = check_space(
            checkpoint_folder(config), checkpoint_bytes(parameters, config), kept_checkpoints(config, steps)
        )
        if warning:
            print(f"warning: {warning}", file=sys.stderr, flush=True)


def _check_sinks(record: TrainingRecord) -> None:
    """Steps that fill no sink are not trained; a run of none cannot start."""
    if record.total_steps is None or not record.sink_size:
        return
    steps, size = record.steps_per_epoch * record.epochs, record.sink_size
    if steps < size:
        raise UsageError(
            f"runner_config.sink_size is {size}, but the run has {steps} steps ({record.epochs} epochs of "
            f"{record.steps_per_epoch}), which fill no sink; lower sink_size."
        )
    if steps > record.total_steps:
        rest = steps - record.total_steps
        print(f"note: the last {rest} of {steps} steps are not trained, in no sink of {size}", flush=True)


def _check_position(config: dict, record: TrainingRecord) -> Callable[[TrainingRecord, int, int], None]:
    """Compare with the run that saved, now as far as that is known; returns the check for the open data."""
    for key in ("ignore_data_skip", "data_skip_steps"):
        if config.get(key):
            raise UsageError(f"{key} is {config[key]!r} in a run that resumes; leave one of both out.")
    section = config.get("checkpoint")
    given = Path((section or {}).get("load_path") or config["load_checkpoint"])
    common = dict.fromkeys(("step_num", "epoch_num", "global_batch_size"))
    if section:
        common, saved = read_iteration(given)
    else:  # the older format holds the numbers as tensors, which MindFormers reads
        saved = next(filter(None, map(read_record, (given, given / "rank_0", given.parent))), None)
    for note in check_resumption(saved, common, record):
        print(f"resume_training: {note}", flush=True)

    def check(opened: TrainingRecord, step: int, batch: int) -> None:
        read = {} if section else {"step_num": step, "global_batch_size": batch}
        check_resumption(saved, common | read, opened)

    return check


def farewell(config: dict, stop: StopRequest, argv: list[str]) -> str:
    """The last lines of an interrupted training: what is saved, and the command that resumes."""
    folder = checkpoint_folder(config)
    latest = stop.saved or next(iter(whole_iterations(folder)), None)
    if latest is None:
        return f"interrupted after {stop.steps} steps of this run; no checkpoint is saved"
    begun = "the last step is saved in" if stop.saved else "the last checkpoint is"
    text = f"interrupted after {stop.steps} steps of this run; {begun} {latest}"
    record = read_record(latest)
    if record and record.total_steps and record.step >= record.total_steps:
        return f"{text}\nall {record.total_steps} steps of the run are done"
    if config.get("use_parallel"):
        what, resume = "resume", " --resume_training True"
        if on_cpu(config):
            latest = saved_checkpoint(config) or latest  # a file of the whole model
            what, resume = "start from its weights (on CPUs parallel runs cannot be resumed)", ""
        return f"{text}\n{what} by the same command with --load_checkpoint {shlex.quote(str(latest))}{resume}"
    return f"{text}\nresume with: {resuming_command(argv, latest)}"
