"""The hidden folder in which a checkpoint is made, and from which a killed conversion goes on.

Everything is written into ``.<name>.part`` within the output folder, then named: no reader, ours or another,
takes a hidden folder for a checkpoint. Its journal is a line for the conversion as a whole (what makes two of
them the same one), a line for each tensor that is in its place, and one that says that naming has begun. The
journal is locked while a conversion runs.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import fsync

JOURNAL = "journal"
Entry = dict[str, Any]  # a line of the journal


@dataclass
class Staging:
    """An unfinished output: its hidden folder, and what the journal says is done."""

    folder: Path
    path: Path
    journal: BinaryIO
    done: dict[tuple[str, str], Entry] = field(default_factory=dict)  # (file, tensor) -> what was recorded
    naming: bool = False
    named: list[Path] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def record(self, file: str, tensor: str, content: Entry) -> None:
        """Note that a tensor is in its place."""
        self.done[file, tensor] = {"file": file, "tensor": tensor} | content
        self._append(self.done[file, tensor])

    def _append(self, entry: Entry) -> None:
        with self.lock:
            _add_line(self.journal, entry)

    def name_all(self, names: list[str]) -> None:
        """Give all files their own names, in this order; the last one is what makes the result valid.

        Raises:
            UsageError: one of them has appeared meanwhile, or is gone.
        """
        if not self.naming:
            self._append({"naming": names})
            os.fsync(self.journal.fileno())
        for name in names:
            part, file = self.path / name, self.folder / name
            if self.naming and not part.exists() and file.exists():
                continue  # named before this run took over
            if file.exists():
                raise UsageError(f"{file} appeared during the conversion; nothing is overwritten")
            file.parent.mkdir(parents=True, exist_ok=True)
            part.rename(file)
            self.named.append(file)
            fsync(file.parent)
        fsync(self.folder)


def part_folder(folder: Path, name: str) -> Path:
    """Where an output of ``folder`` is made: a file called ``name``, or, if that is empty, the usual ones."""
    return folder / f".{name or 'conversion'}.part"


@contextmanager
def staging(folder: Path, name: str, identity: Entry, resume: bool) -> Iterator[Staging]:
    """Make or, with ``resume``, take over the hidden folder of an output; remove it at the end.

    A failure leaves nothing, unless ``resume`` is asked for, which keeps what is done. ``identity`` is
    what must agree for a conversion to be the one that was begun: names of its aspects -> JSON values.

    Raises:
        UsageError: an unfinished conversion is there and ``resume`` is not asked for, or it is another one,
            or it is running.
    """
    path = part_folder(folder, name)
    if path.exists() and not resume:
        raise UsageError(
            f"{path} is what an unfinished conversion to this place left; continue it with --resume, or "
            "delete that folder"
        )
    created = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / JOURNAL, "a+b") as journal:
            _lock(journal, path)
            stage = Staging(folder, path, journal)
            try:
                _take_over(stage, identity)
                yield stage
            except BaseException:
                if resume and stage.done:
                    print(
                        f"{len(stage.done):,} tensors are kept in {path}: the same command goes on there",
                        file=sys.stderr,
                    )
                else:
                    _remove(stage, stage.named)
                raise
            _remove(stage, [])
    finally:
        for parent in created:
            with suppress(OSError):  # the result is in it, or what is kept, or something else
                parent.rmdir()


def _lock(journal: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another conversion is writing to {path}; wait for it, or stop it") from None


def _take_over(stage: Staging, identity: Entry) -> None:
    """Read what the journal holds up to the first line that is not whole; begin it where nothing is done."""
    identity = json.loads(json.dumps(identity))
    entries, whole = _whole_lines(stage.journal)
    for entry in entries[1:]:
        if "naming" in entry:
            stage.naming = True
        else:
            stage.done[entry["file"], entry["tensor"]] = entry
    if not stage.done and not stage.naming:
        stage.journal.truncate(0)
        _add_line(stage.journal, identity)
        os.fsync(stage.journal.fileno())
        return
    stage.journal.truncate(whole)
    if different := [key for key in identity if entries[0].get(key) != identity[key]]:
        raise UsageError(
            f"{stage.path} was left by a conversion that differs from this one in: {', '.join(different)}. "
            "Give the same again to continue it, or delete that folder"
        )


def _whole_lines(journal: BinaryIO) -> tuple[list[Entry], int]:
    """The entries, and how many bytes they are."""
    journal.seek(0)
    entries: list[Entry] = []
    whole = 0
    for line in journal:
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            entry = None
        if not line.endswith(b"\n") or not _is_sound(entry, first=not entries):
            break
        entries.append(entry)
        whole += len(line)
    return entries, whole


def _is_sound(entry: object, first: bool) -> bool:
    if first or not isinstance(entry, dict) or "naming" in entry:
        return isinstance(entry, dict)
    kinds = {"file": str, "tensor": str, "checksum": str, "nan": int, "inf": int}
    return all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def _add_line(journal: BinaryIO, entry: Entry) -> None:
    journal.write(json.dumps(entry).encode() + b"\n")
    journal.flush()


def _remove(stage: Staging, named: list[Path]) -> None:
    for file in named:
        file.unlink(missing_ok=True)
        if file.parent != stage.folder:
            with suppress(OSError):  # another of its files is in it
                file.parent.rmdir()
    shutil.rmtree(stage.path, ignore_errors=True)
