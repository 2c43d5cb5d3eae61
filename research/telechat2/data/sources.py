"""Where data come from: files, folders, patterns and mixtures, read in numbered batches of lines or items.

The batches depend on the files alone, not on who works on them: that is what makes the result the same for
any number of workers, and a run that was stopped able to go on.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from research.telechat2.common.errors import UsageError
from research.telechat2.data import json_values
from research.telechat2.text.messages import short

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

DATA_FILE = re.compile(r"\.(jsonl|ndjson|json)(\.(gz|zst))?$", re.IGNORECASE)  # of a directory
_MIXTURE_BYTES = 1 << 20  # a mixture is smaller
LINE_KEYS = frozenset(
    ["messages", "dialog", "conversations", "instruction", "input", "output", "text", "data"]
)
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
        return self.path.stat().st_size * _EXPANSION.get(self.path.suffix.lower(), 1)


class Batch(NamedTuple):
    """Lines that follow each other in a file, or items of its JSON array."""

    number: int  # from 0, over all files
    path: Path
    weight: float
    first_line: int  # from 1
    lines: list[bytes]
    unit: str = "line"  # or item
    file: int = 0  # which of all files


class FileState(NamedTuple):
    """What a file was when it had been read."""

    path: str
    bytes: int
    sha256: str
    weight: float


def input_files(path: str | Path) -> list[Path]:
    """Return the files of a path, sorted: itself, those that a pattern matches, or a folder's ``DATA_FILE``s.

    Other files of the folder are named on stderr; its folders are not entered. UsageError without a file.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path)
    if glob.has_magic(str(path)):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not files:
            raise UsageError(f"no file matches the pattern {path}; put it in quotes, and check it with ls")
        return files
    if path.exists():
        raise UsageError(f"{path} is a pipe or device, which is read once only; write its content to a file")
    several = ": several paths are separated by blanks, not by commas" if "," in str(path) else ""
    raise UsageError(f"{path} does not exist; give a jsonl file or a directory of such{several}")


def _files_in(folder: Path) -> list[Path]:
    there = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in there if DATA_FILE.search(file.name) and not _is_single_object(file)]
    others = [file.name for file in there if file not in files]
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    kinds = ".jsonl, .ndjson, .json, also packed: .gz, .zst"
    if not files:
        found = f"{folder} holds no data file ({kinds}){', only ' + listed if others else ''}"
        raise UsageError(f"{found}; for directories in it give a pattern in quotes: '{folder}/**/*.jsonl'")
    if others:
        print(f"{folder}: not read: {listed} (data files are {kinds})", file=sys.stderr)
    return files


def find(paths: Sequence[str | Path]) -> list[Source]:
    """Return all files of ``paths``; a ``.json`` of one object is a mixture: paths and their weights.

    UsageError for a missing or repeated file, a wrong mixture, and when zstandard is needed but missing.
    """
    sources = []
    for path in map(Path, paths):
        if _is_single_object(path):
            sources += _mixture(path)
        else:
            sources += [Source(file) for file in input_files(path)]
    seen: set[Path] = set()
    for source in sources:
        if (real := source.path.resolve()) in seen:
            mixture = f'{{"{source.path}": 2}}'
            raise UsageError(f"{source.path} is given twice; to repeat its lines give a mixture: {mixture}")
        seen.add(real)
        if source.path.suffix.lower() == ".zst":
            _need_zstandard(source.path)
    return sources


_JSON_FILES = (
    'a .json file is a mixture ({"path": weight, …}), an array of conversations, or one on each line'
)


def _is_single_object(path: Path) -> bool:
    """Whether a ``.json`` file is one object and no conversation: a mixture, a manifest, a config."""
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > _MIXTURE_BYTES:
        return False
    text = path.read_bytes().decode("utf-8-sig", "replace")
    if not text.strip():
        return True
    try:
        content = json.loads(text, parse_int=float)  # int refuses more than 4300 digits
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys().isdisjoint(LINE_KEYS)


def _mixture(path: Path) -> list[Source]:
    try:
        # pairs, as a dict would keep the last weight of a path and lose the others
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=tuple, parse_int=float) if text.strip() else None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no mixture: not JSON ({error}); {_JSON_FILES}") from error
    if not isinstance(content, tuple) or not content:
        raise UsageError(f"{path} is {'no mixture' if content is not None else 'empty'}; {_JSON_FILES}")
    for name, times in Counter(name for name, _ in content).items():
        if times > 1:
            raise UsageError(f"{path} gives {name} {times} weights; expected one: write their sum")
    sources = []
    for name, weight in content:
        _check_weight(path, name, weight)
        try:
            files = input_files(path.parent / name)
        except UsageError as error:
            slashes = "; write / for \\" if "\\" in name else ""
            raise UsageError(f"{path}: {error} (its paths start from its own folder{slashes})") from error
        if inner := next((file for file in files if _is_single_object(file)), None):
            raise UsageError(f"{path} names {inner}, which is no data but an object; mixtures do not nest")
        sources += [Source(file, float(weight)) for file in files]
    return sources


def _check_weight(path: Path, name: str, weight: object) -> None:
    if isinstance(weight, (list, tuple)):  # an object is a tuple of pairs here
        kind = "a list" if isinstance(weight, list) else "an object"
        raise UsageError(
            f"{path} is no mixture: {name} is {kind}; of data give the array alone; {_JSON_FILES}"
        )
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1000:
        found = f"{path} gives {name} the weight {short(weight)}"
        raise UsageError(f"{found}; expected a number in (0, 1000]; {_JSON_FILES}")


def read_batches(
    sources: list[Source], read: list[FileState], skip: int, advance: Callable[[int], object]
) -> Iterator[Batch]:
    """Yield the batches of all files from number ``skip`` on; where a file ends, add its state to ``read``.

    ``advance`` gets the number of bytes read from the disk. UsageError for a broken file or too long a line.
    """
    number = 0
    for index, source in enumerate(sources):
        with open(source.path, "rb", buffering=0) as file:
            raw = _Counting(file, advance)
            first_line = 1
            for unit, lines in _grouped(source.path, raw):
                if number >= skip:
                    yield Batch(number, source.path, source.weight, first_line, lines, unit, index)
                number += 1
                first_line += len(lines)
            while raw.read(BATCH_BYTES):
                pass
        read.append(FileState(str(source.path), raw.position, raw.sha256.hexdigest(), source.weight))


def read_file(path: str | Path, is_data: bool) -> Iterator[tuple[str, int, bytes]]:
    """Yield (unit, number from 1, bytes) of every line of a file, or of every item of its JSON array.

    ``is_data``: False for a text, whose lines are lines whatever it begins with. UsageError as in
    ``read_batches``.
    """
    with open(path, "rb", buffering=0) as raw:
        found = ((unit, line) for unit, lines in _grouped(Path(path), raw, is_data) for line in lines)
        for number, (unit, line) in enumerate(found, 1):
            yield unit, number, line


def _open_packed(path: Path, raw: io.RawIOBase) -> io.BufferedReader:
    """A reader of the unpacked bytes."""
    file: io.BufferedReader = io.BufferedReader(raw, BATCH_BYTES)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), BATCH_BYTES)
    if suffix == ".zst":
        _need_zstandard(path)
        return io.BufferedReader(_Zstandard(file), BATCH_BYTES)
    return file


def _need_zstandard(path: Path) -> None:
    if find_spec("zstandard") is None:
        remedy = f"install it with: pip install zstandard, or unpack the file with: unzstd {path}"
        raise UsageError(f"{path} needs zstandard, which is not installed; {remedy}")


def _grouped(path: Path, raw: io.RawIOBase, is_data: bool = True) -> Iterator[tuple[str, list[bytes]]]:
    """What the numbers of a file count, and its lines or items, some BATCH_BYTES at a time."""
    number, size, lines = 0, 0, []
    unit = "line"
    try:
        file = _open_packed(path, raw)
        if is_data and json_values.is_one_value(path, file.peek(1 << 16)):
            unit, found = "item", json_values.items(path, file, LINE_BYTES)
        else:
            found = _lines(path, file)
        for number, line in enumerate(found, 1):  # noqa: B007 (an error names it)
            lines.append(line)
            size += len(line)
            if size >= BATCH_BYTES:
                yield unit, lines
                size, lines = 0, []
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(
            f"{path} is broken after {unit} {number} ({error}); fetch or pack it again"
        ) from error
    if lines:
        yield unit, lines


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
        if len(line) > LINE_BYTES:
            raise UsageError(f"{path}, line {number} is longer than {LINE_BYTES >> 20} MB; split it")
        yield line


class _Counting(io.RawIOBase):
    """A file that counts and hashes the bytes that are read, and calls ``advance`` with their number."""

    def __init__(self, file: io.RawIOBase, advance: Callable[[int], object]):
        self.file, self.advance = file, advance
        self.position = 0
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        count = self.file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.position += count
        self.advance(count)
        return count


class _Zstandard(io.RawIOBase):
    """Unpacks zstd frames; unlike the library's own reader it notices that the last one is cut short."""

    def __init__(self, raw: io.BufferedReader):
        import zstandard

        self.raw = raw
        self.error = zstandard.ZstdError
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame: zstandard.ZstdDecompressionObj | None = None
        self.packed = b""
        self.unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        while not self.unpacked:
            # little at a time: a few bytes may hold as many megabytes
            self.packed = self.packed or self.raw.read(4096)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it ends within a zstd frame")
                return 0
            self.frame = self.frame or self.new_frame()
            try:
                self.unpacked = memoryview(self.frame.decompress(self.packed))
            except self.error as error:
                raise EOFError(str(error)) from error
            self.packed = b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        into = memoryview(buffer)
        count = min(len(into), len(self.unpacked))
        into[:count] = self.unpacked[:count]
        self.unpacked = self.unpacked[count:]
        return count
