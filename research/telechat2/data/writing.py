"""Writing records as MindRecord files: complete, or absent.

MindRecord stores a file's base name inside the file and in its index (``.db``) and refuses to be read under
another one, so the temporary name is that of a directory: ``.<name>.partial/`` holds the files under their
final names, and what an interrupted run needs to go on. When all are there they are moved out; the manifest
``<name>.json`` comes last and makes the data set valid.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research.telechat2.common.cli import interrupt_afterwards
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import fsync
from research.telechat2.data.encoding import TRAINED
from research.telechat2.text import prompt_format
from research.telechat2.text.vocabulary import IdArray, TokenArray

Record = dict[str, IdArray]  # input_ids and labels
IGNORED_LABEL = -100
FILE_BYTES = 2 << 30  # of records; more of them go into numbered files
_BATCH = 128  # records handed to the writer at once


def output_file(output_path: str | Path) -> Path:
    """Return the file ``--output_path`` stands for: itself if so named, else dataset.mindrecord in it."""
    path = Path(output_path)
    is_file = path.suffix == ".mindrecord" and not str(output_path).endswith(os.sep) and not path.is_dir()
    return path if is_file else path / "dataset.mindrecord"


def numbered_file(path: Path, number: int) -> Path:
    """Return the name of a part: dataset-00003.mindrecord."""
    return path.with_name(f"{path.stem}-{number:05}{path.suffix}")


def partial_folder(path: Path) -> Path:
    """Return the folder in which ``path`` is made."""
    return path.with_name(f".{path.name}.partial")


def report_file(path: Path) -> Path:
    """Return the name of the HTML report."""
    return path.with_name(f"{path.name}.html")


def check_absent(path: Path) -> None:
    """UsageError when the result or part of it exists, or a file is in the way."""
    file = next((folder for folder in path.parents if folder.is_file()), None)
    if file:
        raise UsageError(f"cannot write {path}: {file} is a file; choose another --output_path")
    numbered = sorted(path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}"))
    manifest = prompt_format.manifest_path(path)
    for existing in (path, index_of(path), manifest, report_file(path), *numbered):
        if existing.exists():
            found = f"{existing} exists and is not overwritten"
            raise UsageError(f"{found}; delete it or choose another --output_path")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; UsageError when one is in it. The lock ends with the process."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another run is writing in {folder}; wait for it, or end it") from error
        yield


def fill_record(pieces: Iterable[TokenArray], length: int, pad_token_id: int) -> Record:
    """Join pieces of tokens (uint32, see encoding) into one record, padded on the right.

    Returns int32 arrays of ``length``: input_ids, and labels, which the model moves by one: labels[i] is
    input_ids[i] where it is trained, else IGNORED_LABEL, and so at the first, which nothing predicts.
    """
    tokens = np.full(length, pad_token_id, np.uint32)
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        assert end <= length, "packing overfilled a record"
        tokens[start:end] = piece
    input_ids = (tokens & ~TRAINED).view(np.int32)
    labels: IdArray = np.where(tokens >= TRAINED, input_ids, np.int32(IGNORED_LABEL))
    labels[0] = IGNORED_LABEL
    return {"input_ids": input_ids, "labels": labels}


def count_documents(input_ids: npt.NDArray[np.integer[Any]], start_ids: Sequence[int]) -> int:
    """Return how many documents a record holds; what stands before the first start is one too."""
    return 1 + int(np.isin(input_ids[1:], start_ids).sum())


def write_records(path: Path, records: Iterable[Record], advance: Callable[[int], object]) -> None:
    """Write records to ``path`` and its index, in place of what a stopped run left there, and fsync them.

    OSError when that fails.
    """
    for file in (path, index_of(path)):
        file.unlink(missing_ok=True)
    with interrupt_afterwards("MindSpore is loaded"):
        from mindspore.mindrecord import FileWriter
        from mindspore.mindrecord.common.exceptions import MindRecordException

    records = iter(records)
    column = {"type": "int32", "shape": [-1]}
    try:
        writer = FileWriter(str(path), shard_num=1)
        writer.add_schema({"input_ids": column, "labels": column}, "TeleChat2 conversations")
        while batch := list(islice(records, _BATCH)):
            writer.write_raw_data(batch)
            advance(len(batch))
        writer.commit()
    except (MindRecordException, RuntimeError) as error:
        remedy = "free space if the disk is full, and continue with --resume"
        raise OSError(f"MindSpore could not write {path}: {error}; {remedy}") from error
    for file in (path, index_of(path)):
        fsync(file)


def publish(folder: Path, target: Path) -> None:
    """Move what ``moves.json`` lists to its place, if not moved before; delete ``folder``."""
    for name in json.loads((folder / "moves.json").read_text(encoding="utf-8")):
        if (folder / name).exists():
            os.rename(folder / name, target.parent / name)
    fsync(target.parent)
    shutil.rmtree(folder)


def index_of(path: Path) -> Path:
    """Return the index that MindSpore keeps beside a file."""
    return path.with_name(f"{path.name}.db")
