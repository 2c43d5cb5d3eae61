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
    text = str(output_path)
    path = Path(text)
    is_file = path.suffix == ".mindrecord" and not text.endswith(os.sep) and not path.is_dir()
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
        raise UsageError(
            f"cannot write {path}: {file} is a file, not a directory; choose another --output_path"
        )
    numbered = sorted(path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}"))
    manifest = prompt_format.manifest_path(path)
    for existing in (path, index_of(path), manifest, report_file(path), *numbered):
        if existing.exists():
            raise UsageError(
                f"{existing} exists and is not overwritten; delete it or choose another --output_path"
            )


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

    Returns int32 arrays of ``length``: input_ids, and labels with IGNORED_LABEL wherever a token is not
    trained, and at the first, which has no position to predict it from; labels[i] belongs to input_ids[i]
    (the model shifts).
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
    """Write records to ``path`` and its index, and have them on the disk. OSError when that fails."""
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
        raise OSError(
            f"MindSpore could not write {path}, perhaps because the disk is full: {error}; "
            f"correct that, and continue with --resume"
        ) from error
    for file in (path, index_of(path)):
        fsync(file)


def discard(path: Path) -> None:
    """Delete a MindRecord file that was not finished, and its index."""
    for file in (path, index_of(path)):
        file.unlink(missing_ok=True)


def publish(folder: Path, target: Path) -> None:
    """Move what ``folder`` lists in its ``moves.json`` to its place, the manifest last; delete the folder.

    Whatever was moved before an interruption is left where it is.
    """
    for name in json.loads((folder / "moves.json").read_text(encoding="utf-8")):
        if (folder / name).exists():
            os.rename(folder / name, target.parent / name)
    fsync(target.parent)
    shutil.rmtree(folder)


def index_of(path: Path) -> Path:
    """Return the index that MindSpore keeps beside a file."""
    return path.with_name(f"{path.name}.db")
