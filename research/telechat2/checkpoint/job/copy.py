"""Moving tensors into safetensors files: several at a time, in blocks, with a checksum of all that passes.

A safetensors file is a header and then bytes whose places are known beforehand, so that tensors are written
in any order and by several threads (reading, writing, hashing and NumPy's reductions all release the GIL).
At no time does a thread hold more than a few blocks: see ``MEMORY_BYTES``.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import xxhash

from research.telechat2.checkpoint.storage.dtypes import count_nonfinite
from research.telechat2.checkpoint.storage.safetensors_format import BYTES, header_bytes
from research.telechat2.checkpoint.storage.tensor import BLOCK_BYTES, StoredTensor, Weights

THREADS = 4  # two wait for the disk while two copy
BATCH_BYTES = 256 << 20  # go to the disk together, while others are being copied
# A thread holds a block, and at worst (bfloat16 to float16) its float32 form with temporaries of a cast.
MEMORY_BYTES = THREADS * 10 * BLOCK_BYTES

Passed = Callable[[int], None]  # told the bytes of each block as it passes
Task = Callable[[], Iterable["Task"]]


@dataclass(frozen=True)
class Content:
    """What was seen of a tensor as it was written: the xxh3_128 of its bytes, its NaN and infinities."""

    checksum: str
    nan: int = 0
    inf: int = 0


@dataclass(frozen=True)
class Placed:
    """A tensor, its name and dtype in the output, and its range of bytes there."""

    tensor: StoredTensor
    name: str
    dtype: str
    begin: int
    end: int


@dataclass(frozen=True)
class Output:
    """A safetensors file to be: its name within the output folder, its head, its tensors in their order."""

    name: str
    head: bytes
    tensors: tuple[Placed, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.tensors[-1].end if self.tensors else len(self.head)


def lay_out(name: str, weights: Weights, dtype: str | None, metadata: Mapping[str, str]) -> Output:
    """Decide the place of every weight in a file; ``dtype`` None keeps each one's own, which may be any."""
    # Wide elements first: every tensor then begins at a multiple of its element's width.
    kinds = sorted(((tensor, target, dtype or tensor.dtype) for tensor, target in weights),
                   key=lambda weight: BYTES[weight[2]], reverse=True)  # fmt: skip
    head = header_bytes({target: (kind, tensor.shape) for tensor, target, kind in kinds}, metadata)
    placed, begin = [], len(head)
    for tensor, target, kind in kinds:
        end = begin + tensor.size * BYTES[kind]
        placed.append(Placed(tensor, target, kind, begin, end))
        begin = end
    return Output(name, head, tuple(placed))


def batches(tensors: Iterable[Placed]) -> Iterator[list[Placed]]:
    """Tensors that follow each other, some ``BATCH_BYTES`` at a time."""
    batch: list[Placed] = []
    for placed in tensors:
        batch.append(placed)
        if placed.end - batch[0].begin >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def create(output: Output, file: Path) -> None:
    """Make the file, of its full size, with its head; what is there of it stays (a run that is resumed)."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.truncate(descriptor, output.size)
        _write(descriptor, output.head, 0)
    finally:
        os.close(descriptor)


def copy(placed: Placed, file: Path, passed: Passed) -> Content:
    """Copy a tensor to its place in ``file``; ``passed`` is told every block's number of bytes."""
    digest, nan, inf, position = xxhash.xxh3_128(), 0, 0, placed.begin
    descriptor = os.open(file, os.O_WRONLY)
    try:
        for block in placed.tensor.blocks_as(placed.dtype):
            digest.update(block)
            nans, infs = count_nonfinite(block, placed.dtype)
            _write(descriptor, block, position)
            nan, inf, position = nan + nans, inf + infs, position + len(block)
            passed(len(block))
            del block  # its buffer makes room for the next one's
    finally:
        os.close(descriptor)
    assert position == placed.end, placed.name
    return Content(digest.hexdigest(), nan, inf)


def checksum_of_range(file: Path, begin: int, end: int, passed: Passed = lambda _: None) -> str:
    """The checksum of bytes ``begin`` to ``end`` of a file; of fewer where the file is shorter."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(end - begin, BLOCK_BYTES)))
    with open(file, "rb", buffering=0) as stream:
        stream.seek(begin)
        while begin < end and (count := stream.readinto(buffer[: end - begin])):
            digest.update(buffer[:count])
            passed(count)
            begin += count
    return digest.hexdigest()


def content_of(data: bytearray, dtype: str) -> Content:
    """The same of bytes in memory."""
    return Content(xxhash.xxh3_128_hexdigest(data), *count_nonfinite(data, dtype))


def work(tasks: Iterable[Task], halted: Event) -> None:
    """Run tasks in threads until none is left; what a task returns are further tasks, which go first.

    The first failure, or an interrupt, sets ``halted`` and is raised when every thread has come to an end.
    """
    waiting = deque(tasks)
    running: set[Future[Iterable[Task]]] = set()
    with ThreadPoolExecutor(THREADS, "copying") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < THREADS:
                    running.add(pool.submit(waiting.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    waiting.extendleft(reversed(list(future.result())))
        except BaseException:
            halted.set()
            raise


def _write(descriptor: int, block: memoryview | bytes, position: int) -> None:
    view = memoryview(block)
    while len(view):
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count
