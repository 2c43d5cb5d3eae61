"""MindFormers 1.9's CheckpointMonitor, with a record beside each checkpoint, and an end that loses nothing.

In a run it takes the place of MindFormers' class. It adds ``training.json``, a check of the free bytes before
anything is written, the folder as it was after a failed save, and a stop at the end of a step after Ctrl-C.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import ClassVar

from research.telechat2.checkpoint.storage.folders import TRACKER
from research.telechat2.common.files import atomic_write
from research.telechat2.compat.library import (
    CommonInfo,
    LibraryCheckpointMonitor,
    get_output_subpath,
    get_real_rank,
)
from research.telechat2.run.space import free_bytes, gigabytes
from research.telechat2.run.training import Training


class _CommonInfo(CommonInfo):
    """``common.json``, and the record before it; the first process writes both, before the tracker."""

    def save_common(self, common_filename: str):
        """Write the record, then MindFormers' file."""
        CheckpointMonitor.training.record.at(self.step_num).write(Path(common_filename).parent)
        super().save_common(common_filename)


class CheckpointMonitor(LibraryCheckpointMonitor):
    """See the file's docstring; its settings are MindFormers'.

    Attributes:
        training: the run that saves, of which MindFormers, which builds the callback, knows nothing.
    """

    training: ClassVar[Training | None] = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.common_info = _CommonInfo()

    def on_train_begin(self, run_context):
        """From now on Ctrl-C waits for the end of a step."""
        super().on_train_begin(run_context)
        self.training.stop.begin()

    def on_train_step_begin(self, run_context):
        """Take SIGINT back from MindSpore's data set, whose handler ends the process."""
        super().on_train_step_begin(run_context)
        self.training.stop.begin_step()

    def on_train_step_end(self, run_context):
        """Save where a checkpoint is due; after Ctrl-C end the run, which saves the last step."""
        super().on_train_step_end(run_context)
        stop = self.training.stop
        stop.steps = run_context.original_args().cur_step_num
        if stop.is_due(stop.steps):
            run_context.request_stop()

    def _save_megatron_ckpt_file_format(self, cb_params):
        if cb_params.cur_step_num in (0, self._last_triggered_step):
            return
        root = Path(self.directory or get_output_subpath("checkpoint", append_rank=False))
        folder = root / f"iteration_{self._append_step_num + cb_params.cur_step_num:08d}"
        cells = [cb_params.network.network] + ([cb_params.network.optimizer] if self.save_optimizer else [])
        with saving(folder, _bytes_of(cells)):
            super()._save_megatron_ckpt_file_format(cb_params)
        self.training.stop.saved = folder

    def save_checkpoint(self, cb_params):
        """Save a file of the older format, named by epoch and step."""
        folder = Path(self._directory)
        before = set(folder.iterdir())
        try:
            with _naming_failure(folder, _bytes_of([cb_params.train_network]), _make_room(folder.parent)):
                super().save_checkpoint(cb_params)
        except BaseException:
            for path in set(folder.iterdir()) - before:
                path.unlink(missing_ok=True)
            raise
        self.training.record.at(self._append_step_num + cb_params.cur_step_num).write(folder)
        self.training.stop.saved = folder.parent  # which resuming is given


@contextmanager
def saving(folder: Path, needed: int) -> Iterator[None]:
    """Around the save of an iteration: if it fails, its folder goes, and the tracker keeps its content."""
    tracker = folder.parent / TRACKER
    named = tracker.read_text(encoding="utf-8") if tracker.is_file() else None
    kept = "no earlier one is there; make room, and start again"
    if named and named.strip():
        kept = f"iteration {named.strip()} is kept; {_make_room(folder.parent)}"
    try:
        with _naming_failure(folder, needed, kept):
            yield
    except BaseException:
        if get_real_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            _restore(tracker, named)
        raise


def _restore(tracker: Path, named: str | None) -> None:
    """Let the tracker name the checkpoint that it named, which MindFormers may have emptied."""
    with suppress(OSError):
        if named is None:
            tracker.unlink(missing_ok=True)
        elif tracker.read_text(encoding="utf-8") != named:
            with atomic_write(tracker) as temporary:
                temporary.write_text(named, encoding="utf-8")


@contextmanager
def _naming_failure(folder: Path, needed: int, kept: str) -> Iterator[None]:
    """Refuse to save what cannot fit; a failure of the disk is an OSError with the path and the bytes."""
    if (free := free_bytes(folder)) < needed:
        sizes = f"the checkpoint needs {gigabytes(needed)}, and {gigabytes(free)} are free"
        raise OSError(f"the disk of {folder} is full: {sizes}; {kept}.")
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or "os error" in str(error) or free_bytes(folder) < needed:
            raise OSError(
                f"the checkpoint {folder} could not be saved: {str(error).strip()} It needs "
                f"{gigabytes(needed)}, and {gigabytes(free_bytes(folder))} are free; {kept}."
            ) from error
        raise


def _make_room(folder: Path) -> str:
    return f"make room, and resume with --load_checkpoint {folder} --resume_training True"


def _bytes_of(cells) -> int:
    """Bytes of this process's part of all parameters of ``cells``."""
    parameters = {p.name: p for cell in cells for p in cell.get_parameters()}
    return sum(prod(p.shape) * p.itemsize for p in parameters.values())
