"""A tensor of a checkpoint: its description, and its bytes a block at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import xxhash

from research.telechat2.checkpoint.storage.dtypes import NOT_READ, cast
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError

BLOCK_BYTES = 1 << 20  # a multiple of every element's width, and little enough for a core's cache

Shape = tuple[int, ...]
Blocks = Iterator[memoryview]
Extent = tuple[Path, int, int]  # a file, and the first byte and the one after the last of a range of it


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint; ``dtype`` is NumPy's name, bfloat16, or the file's word for another.

    ``blocks(start, stop)`` yields its bytes from ``start`` up to ``stop`` (by default all) in order, at most
    ``BLOCK_BYTES`` at a time, little-endian and row by row. A block is valid until the next one is asked for.
    ``extents`` says where the same bytes lie, in order, where that is known and worth listing: such a tensor
    is verified without being read a second time.
    """

    name: str
    dtype: str
    shape: Shape
    file: Path
    blocks: Callable[..., Blocks]
    extents: tuple[Extent, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def kind(self) -> tuple[str, Shape]:
        """Dtype and shape."""
        return self.dtype, self.shape

    def nbytes(self, dtype: str | None = None) -> int:
        """Number of bytes, as stored or as another dtype of weights; UsageError for what is none of these."""
        kind = dtype or self.dtype
        if kind not in WIDTH:
            raise UsageError(f"{self.name} in {self.file} is stored as {kind}, but {NOT_READ}.")
        return self.size * WIDTH[kind]

    def blocks_as(self, dtype: str) -> Blocks:
        """The blocks, cast to another dtype of weights."""
        # Not a generator, whose variable would keep a block alive while the next one is read.
        return map(lambda block: cast(block, self.dtype, dtype, self.name), self.blocks())

    def read(self, dtype: str | None = None) -> bytearray:
        """All bytes at once, as stored or as another dtype of weights."""
        return gathered(self.blocks_as(dtype or self.dtype))

    def checksum(self, dtype: str | None = None) -> str:
        """The xxh3_128 of the bytes, as stored or as another dtype of weights."""
        digest = xxhash.xxh3_128()
        for block in self.blocks_as(dtype or self.dtype):
            digest.update(block)
        return digest.hexdigest()

    def is_zero(self) -> bool:
        """Whether every byte is 0."""
        return not any(bytes(block).strip(b"\0") for block in self.blocks())


Weights = list[tuple[StoredTensor, str]]  # each with its name in the output


def gathered(blocks: Blocks) -> bytearray:
    """The bytes of all blocks."""
    content = bytearray()
    for block in blocks:
        content += block
    return content


def clip(extents: Iterable[Extent], begin: int, end: int) -> Iterator[Extent]:
    """Bytes ``begin`` to ``end`` of what the extents are, as extents."""
    for file, first, last in extents:
        if begin < last - first and end > 0:
            yield file, first + max(begin, 0), min(last, first + end)
        begin, end = begin - (last - first), end - (last - first)


def zeros(name: str, dtype: str, shape: Shape) -> StoredTensor:
    """A tensor that lies nowhere: all zero, such as the bias of a model that has none."""
    length = prod(shape) * WIDTH[dtype]
    return StoredTensor(name, dtype, shape, Path("zeros"), partial(_zero_blocks, length))


def _zero_blocks(length: int, start: int = 0, stop: int | None = None) -> Blocks:
    length = (length if stop is None else min(stop, length)) - start
    block = memoryview(bytes(min(length, BLOCK_BYTES)))
    while length > 0:
        yield block[:length]
        length -= len(block)


def blocks_of(buffer: memoryview | bytes, start: int = 0, stop: int | None = None) -> Blocks:
    """A contiguous object in memory as blocks of bytes."""
    view = memoryview(buffer).cast("B")[start:stop]
    for begin in range(0, len(view), BLOCK_BYTES):
        yield view[begin : begin + BLOCK_BYTES]
