"""Writing records as MindRecord: one file, complete or absent.

MindRecord stores the file's base name inside the file and in its index (``.db``) and refuses to be read
under another one, so the temporary name is that of a directory: the files are written in
``.<name>.partial/`` under their final names and moved out. The manifest ``<name>.json`` comes last and
makes the data set valid.
"""

import os
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from research.telechat2 import telechat_prompt_format
from research.telechat2.telechat_files import fsync

IGNORED_LABEL = -100
_BATCH = 256  # records handed to the writer at once


def output_file(output_path: str | Path) -> Path:
    """Return the file ``--output_path`` stands for: itself if so named, else dataset.mindrecord in it."""
    text = str(output_path)
    path = Path(text)
    is_file = path.suffix == ".mindrecord" and not text.endswith(os.sep) and not path.is_dir()
    return path if is_file else path / "dataset.mindrecord"


def check_absent(path: Path) -> None:
    """ValueError when the result, part of it or a leftover of it exists, or a file is in the way."""
    file = next((folder for folder in path.parents if folder.is_file()), None)
    if file:
        raise ValueError(
            f"cannot write {path}: {file} is a file, not a directory; choose another --output_path"
        )
    for existing in (path, _index(path), telechat_prompt_format.manifest_path(path)):
        if existing.exists():
            raise ValueError(
                f"{existing} exists and is not overwritten; delete it or choose another --output_path"
            )
    if _partial(path).exists():
        raise ValueError(
            f"{_partial(path)} exists: another run is writing there, or one was interrupted; "
            f"in that case delete it and repeat"
        )


def fill_record(
    conversations: Iterable[tuple[np.ndarray, np.ndarray]], length: int, pad_token_id: int
) -> dict:
    """Join (ids, mask) pairs into one record, padded on the right.

    Returns int32 arrays of ``length``: input_ids, and labels with IGNORED_LABEL wherever the mask is 0;
    labels[i] belongs to input_ids[i] (the model shifts). ValueError when nothing is trained.
    """
    input_ids = np.full(length, pad_token_id, np.int32)
    labels = np.full(length, IGNORED_LABEL, np.int32)
    end = 0
    for ids, mask in conversations:
        start, end = end, end + len(ids)
        assert end <= length, "packing overfilled a record"
        input_ids[start:end] = ids
        labels[start:end] = np.where(mask, ids, IGNORED_LABEL)
    # The first label has no position to predict it from.
    if not (labels[1:] != IGNORED_LABEL).any():
        raise ValueError("a record has no trained token; its conversations hold no answer")
    return {"input_ids": input_ids, "labels": labels}


def write(path: Path, records: Iterable[dict], manifest: dict) -> None:
    """Write records to ``path``, then the manifest; a failure or an interrupt leaves no file behind."""
    from mindspore.mindrecord import FileWriter

    check_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.mkdir()
    manifest_path = telechat_prompt_format.manifest_path(path)
    try:
        written = partial / path.name
        writer = FileWriter(str(written), shard_num=1)
        column = {"type": "int32", "shape": [-1]}
        writer.add_schema({"input_ids": column, "labels": column}, "TeleChat2 conversations")
        records = iter(records)
        while batch := list(islice(records, _BATCH)):
            writer.write_raw_data(batch)
        writer.commit()
        for file in (written, _index(written)):
            fsync(file)
        os.rename(_index(written), _index(path))
        os.rename(written, path)
        telechat_prompt_format.write_json(manifest_path, manifest)
    except BaseException:
        for file in (manifest_path, path, _index(path)):
            file.unlink(missing_ok=True)  # all were absent before
        raise
    finally:
        shutil.rmtree(partial)


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.db")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
