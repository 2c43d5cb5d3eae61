"""A tensor made of parts of others without copying them: its bytes are gathered when they are asked for.

Joining, slicing along an axis, the inverse of both, and exchanging rows are all one thing: seen as a matrix
of ``outer`` rows of bytes, each row is a sequence of ranges of the rows of other tensors. An arrangement of
arrangements is again one: of what was cut and put together again only the bytes asked for are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from research.telechat2.checkpoint.storage.tensor import (
    BLOCK_BYTES,
    Blocks,
    Extent,
    Shape,
    StoredTensor,
    blocks_of,
    clip,
    gathered,
)
from research.telechat2.common.dtypes import WIDTH

LONG_RUN = 1 << 20  # ranges of a row that are worth a read of their own; shorter ones are read by whole rows
MANY_EXTENTS = 4096  # a list that is worth making: the rows of a matrix are more, the heads of a layer fewer

# A tensor, and the first of its bytes, or of those of each of its rows, and the one after the last.
Piece = tuple[StoredTensor, int, int]


def join(parts: Sequence[StoredTensor], name: str, shape: Shape) -> StoredTensor:
    """Tensors of one dtype as a single tensor: their bytes one after the other, which is ``shape``."""
    if len(parts) == 1 and parts[0].shape == shape:
        return parts[0]
    return _arrange([(part, 0, part.nbytes()) for part in parts], 1, name, shape)


def cut(tensor: StoredTensor, shapes: Sequence[Shape]) -> list[StoredTensor]:
    """The inverse of ``join``: consecutive ranges of a tensor's bytes as tensors of these shapes."""
    if list(shapes) == [tensor.shape]:
        return [tensor]
    assert sum(map(prod, shapes)) == tensor.size
    parts, begin = [], 0
    for number, shape in enumerate(shapes):
        end = begin + prod(shape) * WIDTH[tensor.dtype]
        parts.append(_arrange([(tensor, begin, end)], 1, f"{tensor.name}[{number}]", shape))
        begin = end
    return parts


def rows_of(pieces: Sequence[Piece], name: str, shape: Shape) -> StoredTensor:
    """A tensor of ``shape`` made of ranges of rows: (tensor, first row, the row after the last) in order."""
    widths = [tensor.nbytes() // tensor.shape[0] for tensor, _, _ in pieces]
    ranges = [(tensor, begin * n, end * n) for n, (tensor, begin, end) in zip(widths, pieces, strict=True)]
    return _arrange(ranges, 1, name, shape)


def part_of(tensor: StoredTensor, axis: int, index: int, parts: int) -> StoredTensor:
    """The ``index``-th of ``parts`` equal parts along ``axis``, whose length they divide."""
    length = tensor.shape[axis] // parts
    outer = prod(tensor.shape[:axis])
    nbytes = tensor.nbytes() // outer // parts
    shape = (*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])
    return _arrange([(tensor, index * nbytes, (index + 1) * nbytes)], outer, tensor.name, shape)


def glue(parts: Sequence[StoredTensor], axis: int) -> StoredTensor:
    """Tensors of one dtype and shape put together along ``axis``: the inverse of ``part_of``."""
    first = parts[0]
    outer = prod(first.shape[:axis])
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    return _arrange([(part, 0, part.nbytes() // outer) for part in parts], outer, first.name, shape)


@dataclass(frozen=True)
class _Arrangement:
    """The ``blocks`` of an arranged tensor."""

    pieces: tuple[Piece, ...]
    outer: int

    def __call__(self, start: int = 0, stop: int | None = None) -> Blocks:
        row = sum(end - begin for _, begin, end in self.pieces)
        stop = self.outer * row if stop is None else min(stop, self.outer * row)
        if start >= stop:
            return
        if self.outer == 1 or row >= LONG_RUN * len(self.pieces):
            yield from self._in_runs(row, start, stop)
        else:
            yield from self._in_rows(row, start, stop)

    def _in_runs(self, row: int, start: int, stop: int) -> Blocks:
        """Read each range of each row by itself."""
        for number in range(start // row, -(-stop // row)):
            place = number * row
            for tensor, begin, end in self.pieces:
                first, last = max(start, place), min(stop, place + end - begin)
                if first < last:
                    offset = number * (tensor.nbytes() // self.outer) + begin - place
                    yield from tensor.blocks(offset + first, offset + last)
                place += end - begin

    def _in_rows(self, row: int, start: int, stop: int) -> Blocks:
        """Read many rows at once, and take the ranges from them."""
        strides = [tensor.nbytes() // self.outer for tensor, _, _ in self.pieces]
        together = max(1, BLOCK_BYTES // max(sum(strides), row))
        for number in range(start // row, -(-stop // row), together):
            count = min(together, -(-stop // row) - number)
            columns = []
            for (tensor, begin, end), stride in zip(self.pieces, strides, strict=True):
                rows = gathered(tensor.blocks(number * stride, (number + count) * stride))
                columns.append(np.frombuffer(rows, np.uint8).reshape(count, stride)[:, begin:end])
            joined = np.concatenate(columns, axis=1)
            yield from blocks_of(joined.data, max(0, start - number * row), stop - number * row)


def _arrange(pieces: Sequence[Piece], outer: int, name: str, shape: Shape) -> StoredTensor:
    resolved = _merge([underlying for piece in pieces for underlying in _resolve(*piece, outer)])
    first = resolved[0][0]
    if len(resolved) == 1 and resolved[0][1:] == (0, first.nbytes() // outer):  # all of it
        return replace(first, name=name, shape=shape)
    assert len({tensor.dtype for tensor, _, _ in resolved}) == 1
    assert outer * sum(end - begin for _, begin, end in resolved) == prod(shape) * WIDTH[first.dtype]
    blocks = _Arrangement(tuple(resolved), outer)
    return StoredTensor(name, first.dtype, shape, first.file, blocks, _extents(resolved, outer))


def _extents(pieces: Sequence[Piece], outer: int) -> tuple[Extent, ...] | None:
    """Where the bytes lie, unless they lie in many places."""
    if outer * len(pieces) > MANY_EXTENTS:
        return None
    extents: list[Extent] = []
    for number in range(outer):
        for tensor, begin, end in pieces:
            if tensor.extents is None:
                return None
            offset = number * (tensor.nbytes() // outer)
            extents += clip(tensor.extents, offset + begin, offset + end)
    return tuple(extents) if len(extents) <= MANY_EXTENTS else None


def _resolve(tensor: StoredTensor, begin: int, end: int, outer: int) -> list[Piece]:
    """A range as ranges of what ``tensor`` is an arrangement of, if it is one of the same rows."""
    if not isinstance(tensor.blocks, _Arrangement) or tensor.blocks.outer != outer:
        return [(tensor, begin, end)]
    found, place = [], 0
    for inner, first, last in tensor.blocks.pieces:
        low, high = max(begin, place), min(end, place + last - first)
        if low < high:
            found.append((inner, first + low - place, first + high - place))
        place += last - first
    return found or [(tensor, begin, end)]  # of no bytes


def _merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring ranges of one tensor as one."""
    merged: list[Piece] = []
    for tensor, begin, end in pieces:
        if merged and merged[-1][0] is tensor and merged[-1][2] == begin:
            begin = merged.pop()[1]
        merged.append((tensor, begin, end))
    return merged
