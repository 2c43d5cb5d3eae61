"""The proof that a written checkpoint is the one that was read.

Every tensor of the new files is read back and must have the checksum that its bytes had when they were
written. Then the files' headers are parsed anew and the table is applied backwards: it must give every tensor
of the source, by name, dtype and shape, made of exactly the bytes that came from it. Where both directions
only move ranges of bytes, the second half is arithmetic on ranges; where they do not, both are read.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from threading import Event

from research.telechat2.checkpoint.job.copy import Output, Placed, Task, work
from research.telechat2.checkpoint.storage.tensor import Extent, StoredTensor, Weights, clip
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError
from research.telechat2.common.tables import listed


def prove(
    tensors: list[StoredTensor],
    outputs: dict[Path, Output],
    sources: Mapping[str, StoredTensor],
    back: Callable[[list[StoredTensor]], Weights],
    dtype: str | None,
) -> None:
    """Apply the inverse to the tensors of the new files and hold the result against the sources.

    ``outputs``: for each new safetensors file what was written there, checksums already compared. Files of
    other formats are not in it, and are compared by reading.

    Raises:
        UsageError: a tensor is not where, what or all that it should be.
    """
    _require_placed(tensors, outputs)
    try:
        found = {name: view for view, name in back(tensors)}
    except UsageError as error:
        raise failed(f"the way back is refused: {error}") from None
    if found.keys() != sources.keys():
        raise failed(f"the way back gives other tensors: {listed(sorted(found.keys() ^ sources.keys()))}")
    to_read = []
    for name, source in sources.items():
        view = found[name]
        expected = (dtype or source.dtype, source.shape)
        if (view.dtype, view.shape) != expected:
            raise failed(f"{name} comes back as {view.dtype} {list(view.shape)}, expected {expected}")
        origins = _origins(view, outputs)
        if origins is None or source.extents is None:
            to_read.append(partial(_compare, name, view, source))
        elif origins != _merged(source.extents):
            raise failed(f"{name} comes back from other places than it was read from")
    work(to_read, Event())


def failed(what: str) -> UsageError:
    """The error of a verification."""
    return UsageError(
        f"the written checkpoint is not the one that was read: {what}. Convert again; if it happens twice, "
        "check the disk and the memory of this machine"
    )


def _require_placed(tensors: list[StoredTensor], outputs: dict[Path, Output]) -> None:
    """Every header says of its tensors what was written there."""
    held = {(tensor.file, tensor.name): tensor for tensor in tensors if tensor.file in outputs}
    expected = {(file, placed.name): placed for file, output in outputs.items() for placed in output.tensors}
    if held.keys() != expected.keys():
        raise failed(f"headers and tensors differ: {listed(sorted(map(str, held.keys() ^ expected.keys())))}")
    for key, placed in expected.items():
        kind = (placed.dtype, placed.tensor.shape, ((key[0], placed.begin, placed.end),))
        if (held[key].dtype, held[key].shape, held[key].extents) != kind:
            raise failed(f"the header of {key[0].name} describes {placed.name} wrongly")


def _compare(name: str, view: StoredTensor, source: StoredTensor) -> Iterable[Task]:
    if view.checksum() != source.checksum(view.dtype):
        raise failed(f"{name} comes back with other values")
    return ()


def _origins(view: StoredTensor, outputs: dict[Path, Output]) -> tuple[Extent, ...] | None:
    """Where the bytes of a view of the new files were read from; None where that is not known."""
    if view.extents is None:
        return None
    origins: list[Extent] = []
    for file, begin, end in view.extents:
        if file not in outputs:
            return None
        for placed, first, last in _overlapping(outputs[file], begin, end):
            if placed.tensor.extents is None:
                return None
            new, old = WIDTH[placed.dtype], WIDTH[placed.tensor.dtype]
            first, last = ((byte - placed.begin) // new * old for byte in (first, last))
            origins += clip(placed.tensor.extents, first, last)
    return _merged(origins)


def _overlapping(output: Output, begin: int, end: int) -> Iterator[tuple[Placed, int, int]]:
    """The tensors that bytes ``begin`` to ``end`` of a file belong to, and which of their bytes they are."""
    number = bisect_right(output.tensors, begin, key=lambda placed: placed.begin) - 1
    for placed in output.tensors[number:]:
        if placed.begin >= end:
            return
        if placed.end > begin:
            yield placed, max(begin, placed.begin), min(end, placed.end)


def _merged(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """Ranges that follow each other in a file as one."""
    merged: list[Extent] = []
    for file, begin, end in extents:
        if merged and merged[-1][0] == file and merged[-1][2] == begin:
            merged[-1] = (file, merged[-1][1], end)
        else:
            merged.append((file, begin, end))
    return tuple(merged)
