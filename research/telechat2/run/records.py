"""MindRecord files before a run: how many records they hold, a bounded look at these, and a hash of all."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np

from research.telechat2.common.errors import UsageError
from research.telechat2.data.records import Row

# At most so much is read before a run, which takes two seconds or three: evenly spaced records.
MAX_RECORDS = 10_000
MAX_IDS = 2**24
MAX_FILES = 100
COLUMNS = ("input_ids", "labels")
_WHOLE_BYTES = 256 * 2**20  # files up to this size are hashed whole, of larger ones evenly spaced blocks
_BLOCK_BYTES = 2**20


def count_records(file: Path) -> int | None:
    """Records of a MindRecord file, from its index; None where that cannot be read."""
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}.db?mode=ro", uri=True)) as index:
            return index.execute("SELECT COUNT(*) FROM INDEXES").fetchone()[0]
    except sqlite3.Error:
        return None


def sample(counts: list[int], length: int) -> list[list[int]]:
    """The records to read of files with ``counts`` records of ``length`` ids: all, or evenly spaced ones."""
    total = sum(counts)
    most = min(total, MAX_RECORDS, max(MAX_IDS // max(length, 1), 1))
    chosen = np.unique(np.linspace(0, max(total - 1, 0), most).round().astype(int))
    starts = np.cumsum([0, *counts])
    found = [(chosen[(chosen >= a) & (chosen < b)] - a).tolist() for a, b in pairwise(starts)]
    opened = set(np.linspace(0, len(counts) - 1, min(len(counts), MAX_FILES)).round().astype(int).tolist())
    return [numbers if place in opened else [] for place, numbers in enumerate(found)]


def read_rows(files: Mapping[Path, int | None], columns: tuple[str, ...]) -> Iterator[Row]:
    """The records of ``sample``, read as they come.

    Args:
        files: file -> its records, in MindFormers' order; None: not known.
        columns: to be read.
    """
    file = next(iter(files))
    first = next(_read(file, columns, [0]), None)
    if first is None:
        raise UsageError(_unreadable(file))
    chosen = sample([count or 0 for count in files.values()], len(np.atleast_1d(first.input_ids)))
    return (row for file, numbers in zip(files, chosen, strict=True) for row in _read(file, columns, numbers))


def _read(file: Path, columns: tuple[str, ...], numbers: list[int]) -> Iterator[Row]:
    if not numbers:
        return
    import mindspore.dataset as ds

    try:
        found = ds.MindDataset([str(file)], shuffle=False).get_col_names()
        if missing := [name for name in columns if name not in found]:
            raise UsageError(
                f"{file} has the columns {', '.join(sorted(found))}, but none named {' and '.join(missing)}; "
                f"prepare the data with telechat_preprocess.py{_without_labels(found)}."
            )
        which = {"columns_list": list(columns), "sampler": ds.SubsetSampler(numbers)}
        data = ds.MindDataset([str(file)], num_parallel_workers=1, **which)
        rows = data.create_tuple_iterator(num_epochs=1, output_numpy=True)
        for number, row in zip(numbers, rows, strict=True):
            yield Row(str(file), number, row[0], row[1] if len(row) > 1 else None)
    except RuntimeError as error:
        raise UsageError(_unreadable(file)) from error


def _without_labels(found: list[str]) -> str:
    if "input_ids" not in found:
        return ""
    return ", or, to train all but the padding, set train_dataset.input_columns: [input_ids]"


def _unreadable(file: Path) -> str:
    remedy = "copy it again with its .db, or prepare the data again."
    return f"{file} is not readable as MindRecord, or empty; {remedy}"


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of files' sizes and contents in their order, whatever their names and folders."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with open(file, "rb") as stream:
            if size <= _WHOLE_BYTES:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                continue
            count = _WHOLE_BYTES // _BLOCK_BYTES
            for number in range(count):
                stream.seek((size - _BLOCK_BYTES) * number // (count - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
