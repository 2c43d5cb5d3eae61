"""Where data come from: files, folders, patterns and mixtures of jsonl, read in numbered batches of lines.

The batches depend on the files alone, not on who works on them: that is what makes the result the same for
any number of workers, and a run that was stopped able to go on.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BATCH_BYTES = 1 << 20
LINE_BYTES = 64 << 20  # a longer line is no jsonl, but a file without line breaks
# How much longer than the file its text may be; it only decides how many buckets are made.
_EXPANSION = {".gz": 5, ".zst": 6}


class Source(NamedTuple):
    """A file, and how often each of its lines is taken on average."""

    path: Path
    weight: float = 1.0

    def text_bytes(self) -> int:
        """About how many bytes of text the file holds."""
        return self.path.stat().st_size * _EXPANSION.get(self.path.suffix, 1)


class Batch(NamedTuple):
    """Lines that follow each other in a file."""

    number: int  # from 0, over all files
    path: Path
    weight: float
    first_line: int  # from 1
    lines: list[bytes]


class FileState(NamedTuple):
    """What a file was when it had been read."""

    path: str
    bytes: int
    sha256: str
    weight: float


def input_files(path: str | Path) -> list[Path]:
    """Return the files of a path: itself, those of a folder, or those that a pattern fits; sorted.

    Folders in a folder are not entered; a pattern with ``**`` does that.

    ValueError if there is none.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(file for suffix in SUFFIXES for file in path.glob(f"*{suffix}"))
        files = [file for file in found if not file.is_dir()]
        if not files:
            raise ValueError(
                f"{path} holds no .jsonl file (nor .jsonl.gz or .jsonl.zst) itself; give a jsonl file, a "
                f"directory of such, or, for directories in it, a pattern in quotes: '{path}/**/*.jsonl'"
            )
        return files
    if path.is_file():
        return [path]
    if glob.has_magic(str(path)):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not files:
            raise ValueError(f"no file fits the pattern {path}; put it in quotes, and check it with ls")
        return files
    raise ValueError(f"{path} does not exist; give a jsonl file or a directory of such")


def find(paths: list[str | Path]) -> list[Source]:
    """Return all files of ``paths``, of which a ``.json`` is a mixture: paths and their weights.

    ValueError when a path leads to nothing, a file is there twice, a mixture is not readable, or zstandard
    is needed and not installed.
    """
    sources = []
    for path in map(Path, paths):
        if path.suffix == ".json" and path.is_file():
            sources += _mixture(path)
        else:
            sources += [Source(file) for file in input_files(path)]
    seen: set[Path] = set()
    for source in sources:
        if (real := source.path.resolve()) in seen:
            raise ValueError(
                f"{source.path} is given twice; to take its lines more than once, "
                f'give a mixture file: {{"{source.path}": 2}}'
            )
        seen.add(real)
    packed = next((source.path for source in sources if source.path.suffix == ".zst"), None)
    if packed and find_spec("zstandard") is None:
        raise ValueError(
            f"{packed} needs zstandard, which is not installed; install it with: pip install zstandard, "
            f"or unpack the file with: unzstd {packed}"
        )
    return sources


def _mixture(path: Path) -> list[Source]:
    try:
        # pairs, as a dict would keep the last weight of a path and lose the others
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=tuple)
    except ValueError as error:
        raise ValueError(f"{path} is no mixture: not JSON ({error}); data end in .jsonl") from error
    if not isinstance(content, tuple) or not content:
        raise ValueError(f'{path} is no mixture; expected {{"path": weight, …}}; data end in .jsonl')
    for name, times in Counter(name for name, _ in content).items():
        if times > 1:
            raise ValueError(f"{path} gives {name} {times} weights; expected one: write their sum")
    sources = []
    for name, weight in content:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1000:
            raise ValueError(f"{path} gives {name} the weight {weight!r}; expected a number in (0, 1000]")
        try:
            files = input_files(path.parent / name)
        except ValueError as error:
            raise ValueError(f"{path}: {error} (paths in a mixture start from its own folder)") from error
        sources += [Source(file, float(weight)) for file in files]
    return sources


def read_batches(
    sources: list[Source], skip: int = 0, advance: Callable[[int], object] = lambda _: None
) -> Iterator[Batch | FileState]:
    """Yield the batches of all files from number ``skip`` on, and a FileState where a file ends.

    ``advance`` is told how many bytes of the files (as they lie on the disk) have been read. ValueError when
    a packed file is broken or cut short, or a line is no line.
    """
    number = 0
    for source in sources:
        with open(source.path, "rb", buffering=0) as file:
            raw = _Counting(file)
            told = 0
            first_line = 1
            for lines in _grouped(source.path, raw):
                advance(raw.position - told)
                told = raw.position
                if number >= skip:
                    yield Batch(number, source.path, source.weight, first_line, lines)
                number += 1
                first_line += len(lines)
            while raw.read(BATCH_BYTES):
                pass
            advance(raw.position - told)
        yield FileState(str(source.path), raw.position, raw.sha256.hexdigest(), source.weight)


def open_packed(path: Path, raw: io.RawIOBase) -> BinaryIO:
    """Return the text's bytes of a file that may be packed, by its suffix."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=io.BufferedReader(raw)), BATCH_BYTES)
    return io.BufferedReader(_Zstandard(raw) if path.suffix == ".zst" else raw, BATCH_BYTES)


def _grouped(path: Path, raw: io.RawIOBase) -> Iterator[list[bytes]]:
    """The lines of a file, some BATCH_BYTES at a time."""
    file = open_packed(path, raw)
    number, size, lines = 0, 0, []
    try:
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise ValueError(
                    f"{path}, line {number} is longer than {LINE_BYTES >> 20} MB; "
                    f"jsonl has one conversation or text on a line: split it"
                )
            lines.append(line)
            size += len(line)
            if size >= BATCH_BYTES:
                yield lines
                size, lines = 0, []
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is broken after line {number} ({error}); it was cut short or damaged: fetch or pack it "
            f"again"
        ) from error
    if lines:
        yield lines


class _Counting(io.RawIOBase):
    """A file that knows how much of it was read, and the hash of that."""

    def __init__(self, file: io.RawIOBase):
        self.file = file
        self.position = 0
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        self.position += count
        return count


class _Zstandard(io.RawIOBase):
    """Unpacks zstd frames; unlike the library's own reader it notices that the last one is cut short."""

    def __init__(self, raw: io.RawIOBase):
        import zstandard

        self.raw = raw
        self.error = zstandard.ZstdError
        self.decompressor = zstandard.ZstdDecompressor()
        self.frame = None
        self.packed = self.unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.unpacked:
            # little at a time: a few bytes may hold as many megabytes
            self.packed = self.packed or self.raw.read(4096)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it ends within a zstd frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            try:
                self.unpacked = memoryview(self.frame.decompress(self.packed))
            except self.error as error:
                raise EOFError(str(error)) from error
            self.packed = b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.unpacked))
        buffer[:count] = self.unpacked[:count]
        self.unpacked = self.unpacked[count:]
        return count
