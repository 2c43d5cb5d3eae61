"""A tensor where it lies: its description, and its bytes a block at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from research.telechat2.checkpoint.dtypes import WIDTH, cast

BLOCK_BYTES = 16 << 20  # a multiple of every element's width: casts work block by block


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint; ``dtype`` is float32, float16, bfloat16, or the file's word for another.

    ``blocks()`` yields its bytes in order, at most ``BLOCK_BYTES`` at a time, little-endian and row by row; a
    block is valid until the next one is asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    blocks: Callable[[], Iterator[memoryview]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def nbytes(self, dtype: str | None = None) -> int:
        """Number of bytes, as stored or as another dtype of weights."""
        return self.size * WIDTH[dtype or self.dtype]

    def blocks_as(self, dtype: str) -> Iterator[memoryview]:
        """The blocks, cast to another dtype of weights."""
        return (cast(block, self.dtype, dtype, self.name) for block in self.blocks())

    def read(self, dtype: str) -> bytearray:
        """All bytes at once, as ``dtype``."""
        content = bytearray()
        for block in self.blocks_as(dtype):
            content += block
        return content


def blocks_of(buffer) -> Iterator[memoryview]:
    """A contiguous object in memory as blocks of bytes."""
    view = memoryview(buffer).cast("B")
    for start in range(0, len(view), BLOCK_BYTES):
        yield view[start : start + BLOCK_BYTES]
