"""A tensor where it lies: its description, and its bytes a block at a time; joined, and cut apart."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from research.telechat2.checkpoint.storage.dtypes import NOT_READ, WIDTH, cast
from research.telechat2.common.errors import UsageError

BLOCK_BYTES = 1 << 20  # a multiple of every element's width, and little enough for a core's cache

Extent = tuple[Path, int, int]  # a file, and the first byte and the one after the last of a range of it


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint; ``dtype`` is float32, float16, bfloat16, or the file's word for another.

    ``blocks(start, stop)`` yields its bytes from ``start`` up to ``stop`` (by default all) in order, at most
    ``BLOCK_BYTES`` at a time, little-endian and row by row; a block is valid until the next one is asked for.
    ``extents`` says where the same bytes lie, in order, where that is known and worth listing: such a tensor
    is verified without being read a second time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    blocks: Callable[..., Iterator[memoryview]]
    extents: tuple[Extent, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def nbytes(self, dtype: str | None = None) -> int:
        """Number of bytes, as stored or as another dtype of weights; UsageError for what is none of these."""
        kind = dtype or self.dtype
        if kind not in WIDTH:
            raise UsageError(f"{self.name} in {self.file} is stored as {kind}, but {NOT_READ}.")
        return self.size * WIDTH[kind]

    def blocks_as(self, dtype: str) -> Iterator[memoryview]:
        """The blocks, cast to another dtype of weights."""
        # Not a generator, whose variable would keep a block alive while the next one is read.
        return map(lambda block: cast(block, self.dtype, dtype, self.name), self.blocks())

    def read(self, dtype: str) -> bytearray:
        """All bytes at once, as ``dtype``."""
        content = bytearray()
        for block in self.blocks_as(dtype):
            content += block
        return content


def join(parts: list[StoredTensor], name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Tensors of one dtype as a single tensor: their bytes one after the other, which is ``shape``."""
    if len(parts) == 1 and parts[0].shape == shape:
        return parts[0]
    assert len({part.dtype for part in parts}) == 1 and sum(part.size for part in parts) == prod(shape)

    def blocks(start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        begin = 0
        for part in parts:
            end = begin + part.nbytes()
            last = end if stop is None else min(end, stop)
            if max(begin, start) < last:
                yield from part.blocks(max(begin, start) - begin, last - begin)
            begin = end

    extents = None
    if all(part.extents is not None for part in parts):
        extents = tuple(extent for part in parts for extent in part.extents)
    return StoredTensor(name, parts[0].dtype, shape, parts[0].file, blocks, extents)


def cut(tensor: StoredTensor, shapes: list[tuple[int, ...]]) -> list[StoredTensor]:
    """The inverse of ``join``: consecutive ranges of a tensor's bytes as tensors of these shapes."""
    if shapes == [tensor.shape]:
        return [tensor]
    assert sum(map(prod, shapes)) == tensor.size
    parts, begin = [], 0
    for number, shape in enumerate(shapes):
        end = begin + prod(shape) * WIDTH[tensor.dtype]
        blocks = _range_of(tensor, begin, end)
        extents = None if tensor.extents is None else tuple(clip(tensor.extents, begin, end))
        name = f"{tensor.name}[{number}]"
        parts.append(StoredTensor(name, tensor.dtype, shape, tensor.file, blocks, extents))
        begin = end
    return parts


def clip(extents: Iterable[Extent], begin: int, end: int) -> Iterator[Extent]:
    """Bytes ``begin`` to ``end`` of what the extents are, as extents."""
    for file, first, last in extents:
        if begin < last - first and end > 0:
            yield file, first + max(begin, 0), min(last, first + end)
        begin, end = begin - (last - first), end - (last - first)


def zeros(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor that lies nowhere: all zero, such as the bias of a model that has none."""
    length = prod(shape) * WIDTH[dtype]
    return StoredTensor(name, dtype, shape, Path("zeros"), partial(_zero_blocks, length))


def _zero_blocks(length: int, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
    length = (length if stop is None else min(stop, length)) - start
    block = memoryview(bytes(min(length, BLOCK_BYTES)))
    while length > 0:
        yield block[:length]
        length -= len(block)


def _range_of(tensor: StoredTensor, begin: int, end: int) -> Callable[..., Iterator[memoryview]]:
    def blocks(start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        return tensor.blocks(begin + start, end if stop is None else min(end, begin + stop))

    return blocks


def blocks_of(buffer, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
    """A contiguous object in memory as blocks of bytes."""
    view = memoryview(buffer).cast("B")[start:stop]
    for begin in range(0, len(view), BLOCK_BYTES):
        yield view[begin : begin + BLOCK_BYTES]
