"""One conversion from its plan to its proven result, whatever the layouts on either side.

A caller says which tensors are read, which weights made of them go to which file, and what leads back. Done
here, for all of them: the table of a dry run, writing in threads, checksums, counts of NaN and infinities,
verification, the manifest, going on after a kill, and naming everything at once at the end.
"""

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import xxhash
from tqdm import tqdm

from research.telechat2.checkpoint.job import copy as copying
from research.telechat2.checkpoint.job import manifest
from research.telechat2.checkpoint.job.copy import Content, Output, Placed, Task, lay_out
from research.telechat2.checkpoint.job.job import Job, Options, Written
from research.telechat2.checkpoint.job.journal import Staging, staging
from research.telechat2.checkpoint.job.output import (
    index_files,
    missing_beside,
    own_name,
    require_absent,
    require_room,
)
from research.telechat2.checkpoint.job.verify import failed, prove
from research.telechat2.checkpoint.storage.folders import READERS
from research.telechat2.checkpoint.storage.framework_formats import Whole, write_bin, write_ckpt
from research.telechat2.checkpoint.storage.tensor import StoredTensor, Weights
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import fsync
from research.telechat2.common.tables import listed

Identities = Mapping[Path, tuple[int, int]]  # of files: bytes, and when changed (ns)
Contents = dict[tuple[str, str], Content]  # by file and tensor
Passed = Callable[[int], None]  # is told how many bytes have passed


def run_job(job: Job, folder: Path, options: Options) -> Written:
    """Write and prove the files of ``job`` in ``folder``: all of them, or none.

    Raises:
        UsageError: something is in the way or changes meanwhile, there is too little room, a value does not
            fit the new dtype, or the result does not prove to be what was read.
    """
    began = time.monotonic()
    read = _identities(job.sources.values())
    if options.dry_run:
        return _summary(job, folder, options, read, {}, began)
    indexes = index_files(job.files, options.dtype)
    beside = missing_beside(folder, job.beside, job.source)
    own = own_name(job.files)
    manifest_file = f"{own}.{manifest.NAME}" if own else manifest.NAME
    names = [*beside, *job.files, *indexes, manifest_file]
    identity = _identity(job, options, read)
    with _disk_full_in_words(folder), staging(folder, own, identity, options.resume) as stage:
        if stage.naming:
            contents = {key: _content(entry) for key, entry in stage.done.items()}
        else:
            require_absent(folder, names)
            sizes, contents = _fill(job, stage, options)
            if _identities(job.sources.values()) != read:
                raise UsageError(f"{job.source} changed while it was read; convert it again")
            text = manifest.manifest_bytes(job, options, read, sizes, contents)
            for name, content in (beside | indexes | {manifest_file: text}).items():
                _write_small(stage.path / name, content)
            for key in contents.keys() - stage.done.keys():  # of .bin and .ckpt files, which are whole now
                stage.record(*key, vars(contents[key]))
        stage.name_all(names)
    return _summary(job, folder, options, read, contents, began)


def _fill(job: Job, stage: Staging, options: Options) -> tuple[dict[str, int], Contents]:
    """Write all weights into the hidden folder, on the disk and proven: bytes of each file, and contents."""
    contents: Contents = {}
    metadata = {"format": job.framework, **job.layout}
    streamed = {
        name: lay_out(name, weights, options.dtype, metadata)
        for name, weights in job.files.items()
        if name.endswith(".safetensors")
    }
    total = job.nbytes(options.dtype)
    require_room(stage.path, total)
    halted = Event()
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as progress:

        def passed(nbytes: int) -> None:
            with stage.lock:
                progress.update(nbytes)
            if halted.is_set():
                raise InterruptedError("another thread failed")

        tasks: list[Task] = []
        for name, output in streamed.items():
            (stage.path / name).parent.mkdir(parents=True, exist_ok=True)
            copying.create(output, stage.path / name)
            for batch in copying.batches(output.tensors):
                tasks += _tasks(name, batch, stage, options.verify, contents, passed)
        copying.work(tasks, halted)
        for name in job.files.keys() - streamed.keys():
            _write_whole(stage.path / name, name, job.files[name], options.dtype, contents, passed)
    if options.verify:
        tensors = [tensor for name in job.files for tensor in READERS[Path(name).suffix](stage.path / name)]
        _require_contents(tensors, stage.path, streamed, contents)
        outputs = {stage.path / name: output for name, output in streamed.items()}
        prove(tensors, outputs, job.sources, job.back, options.dtype)
    return {name: (stage.path / name).stat().st_size for name in job.files}, contents


def _tasks(
    name: str, batch: list[Placed], stage: Staging, verify: bool, contents: Contents, passed: Passed
) -> list[Task]:
    """Copy some tensors of a file; the last one of them has them put on the disk, then all are read back."""
    file = stage.path / name
    left, checked = Counter({"tensors": len(batch)}), set[str]()

    def copy(placed: Placed) -> Iterable[Task]:
        key = (name, placed.name)
        before = _content(stage.done[key]) if key in stage.done else None
        if before and copying.checksum_of_range(file, placed.begin, placed.end) == before.checksum:
            contents[key] = before
            checked.add(placed.name)
            passed(placed.end - placed.begin)
        else:
            contents[key] = copying.copy(placed, file, passed)
            stage.record(*key, vars(contents[key]))
        with stage.lock:
            left["tensors"] -= 1
            last = left["tensors"] == 0
        return [finish] if last else []

    def finish() -> Iterable[Task]:
        fsync(file)
        return [partial(check, placed) for placed in batch if verify and placed.name not in checked]

    def check(placed: Placed) -> Iterable[Task]:
        content = contents[name, placed.name]
        if copying.checksum_of_range(file, placed.begin, placed.end) != content.checksum:
            raise failed(f"{placed.name} in {name} was read back with another checksum than it had")
        return []

    return [partial(copy, placed) for placed in batch]


def _write_whole(
    file: Path, name: str, weights: Weights, dtype: str | None, contents: Contents, passed: Passed
) -> None:
    """Write a .bin or .ckpt file, from memory."""

    def loaded() -> Iterator[Whole]:
        for tensor, target in weights:
            kind = dtype or tensor.dtype
            data = tensor.read(kind)
            contents[name, target] = copying.content_of(data, kind)
            passed(len(data))
            yield target, kind, tensor.shape, data

    file.unlink(missing_ok=True)  # of a run that is resumed
    (write_bin if file.suffix == ".bin" else write_ckpt)(file, loaded())
    fsync(file)


def _require_contents(
    tensors: list[StoredTensor], folder: Path, streamed: Mapping[str, Output], contents: Contents
) -> None:
    """Hold the tensors of .bin and .ckpt files against what was written; the others' have been by now."""
    found = {(str(tensor.file.relative_to(folder)), tensor.name): tensor for tensor in tensors}
    if found.keys() != contents.keys():
        raise failed(f"tensors differ: {listed(sorted(found.keys() ^ contents.keys()))}")
    for key, tensor in found.items():
        if key[0] not in streamed and tensor.checksum() != contents[key].checksum:
            raise failed(f"{key[1]} in {key[0]} was read back with another checksum than it had")


def _write_small(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    fsync(file)


def _content(entry: Mapping[str, Any]) -> Content:
    return Content(entry["checksum"], entry["nan"], entry["inf"])


def _identities(tensors: Iterable[StoredTensor]) -> Identities:
    """Every file that tensors are read from: its bytes, and when it was changed (ns)."""
    files = dict.fromkeys(tensor.file for tensor in tensors)
    files |= dict.fromkeys(file for tensor in tensors for file, _, _ in tensor.extents or ())
    return {file: (stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat())}


def _identity(job: Job, options: Options, read: Identities) -> dict[str, object]:
    """What makes two conversions the same one, by the words that say in what they differ."""
    plan = [
        (file, name, tensor.name, tensor.dtype, tensor.shape)
        + tuple((str(path.absolute()), begin, end) for path, begin, end in tensor.extents or ())
        for file, weights in job.files.items()
        for tensor, name in weights
    ]
    return {
        "the version of the converter": manifest.FORMAT,
        "the files that are read": {str(file.absolute()): identity for file, identity in read.items()},
        "the dtype": options.dtype,
        "the layout": [job.framework, *sorted(job.layout.items())],
        "the tensors of each new file": xxhash.xxh3_128_hexdigest(repr(plan).encode()),
        "the small files beside them": xxhash.xxh3_128_hexdigest(repr(sorted(job.beside.items())).encode()),
    }


@contextmanager
def _disk_full_in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk of {folder} is full ({error.strerror}); free space, or give another place"
        ) from error


def _summary(
    job: Job, folder: Path, options: Options, read: Identities, contents: Contents, began: float
) -> Written:
    tensors = [tensor for tensor, _ in job.weights]
    return Written(
        sources=tuple(read),
        files=tuple(folder / name for name in job.files),
        tensors=len(tensors),
        parameters=sum(tensor.size for tensor in tensors),
        bytes=job.nbytes(options.dtype),
        dtypes=tuple(sorted({options.dtype or tensor.dtype for tensor in tensors})),
        nan=sum(content.nan for content in contents.values()),
        inf=sum(content.inf for content in contents.values()),
        seconds=time.monotonic() - began,
        verified=options.verify,
        table=manifest.table(job, options.dtype) if options.dry_run else None,
        notes=job.notes,
        ignored=job.ignored,
    )
