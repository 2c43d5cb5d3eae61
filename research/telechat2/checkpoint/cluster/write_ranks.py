"""Write a cluster's slices, a folder for each rank."""

import json
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from research.telechat2.checkpoint.storage.rank_folders import _CODE, width_of
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import fsync


def refuse_existing(folder: Path) -> None:
    """Refuse a target that is a file, or that holds ranks of another checkpoint.

    Raises:
        UsageError: with what is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; expected a folder, or a path that does not exist yet")
    if there := sorted(folder.glob("rank_*")):
        raise UsageError(
            f"{folder} already holds {there[0].name}; nothing is overwritten: give another --dst_ckpt_dir, "
            "or delete the old checkpoint"
        )


def write_ranks(folder: Path, prefix: str, ranks: list[list[StoredTensor]]) -> int:
    """Write ``rank_<r>/<prefix><r>.safetensors`` for all ranks or none; returns the tensors' bytes.

    The folders get their names when all files are on the disk, that of rank 0 last.

    Raises:
        UsageError: too little room on the disk, or a target that appeared meanwhile.
    """
    sizes = [sum(tensor.size * width_of(tensor.dtype) for tensor in tensors) for tensors in ranks]
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.part"
    named = []
    try:
        if sum(sizes) > (free := shutil.disk_usage(folder).free):
            raise UsageError(
                f"{folder} has room for {free:,} bytes, the checkpoint needs {sum(sizes):,}; free space, or "
                "give another place"
            )
        progress = tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="transforming", disable=None)
        with progress:
            for rank, tensors in enumerate(ranks):
                part = temporary / f"rank_{rank}"
                part.mkdir(parents=True)
                _write(part / f"{prefix}{rank}.safetensors", tensors, progress)
        refuse_existing(folder)
        for rank in reversed(range(len(ranks))):
            (temporary / f"rank_{rank}").rename(folder / f"rank_{rank}")
            named.append(folder / f"rank_{rank}")
        temporary.rmdir()
        fsync(folder)
    except BaseException:
        for path in (temporary, *named):
            shutil.rmtree(path, ignore_errors=True)
        for path in created:
            with suppress(OSError):  # something else is in it
                path.rmdir()
        raise
    return sum(sizes)


def _write(file: Path, tensors: list[StoredTensor], progress: tqdm) -> None:
    # Wide elements first: every tensor then begins at a multiple of its element's width.
    tensors = sorted(tensors, key=lambda tensor: width_of(tensor.dtype), reverse=True)
    header: dict = {"__metadata__": {"format": "ms"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.size * width_of(tensor.dtype)
        code = _CODE.get(tensor.dtype, tensor.dtype)
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with open(file, "xb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for block in tensor.blocks():
                progress.update(stream.write(block))
    fsync(file)
    fsync(file.parent)
