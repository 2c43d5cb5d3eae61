"""Writing converted checkpoints: whole or not at all, and never over an existing one."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from research.telechat2.checkpoint.dtypes import WIDTH
from research.telechat2.checkpoint.safetensors_files import header_bytes
from research.telechat2.checkpoint.stored import StoredTensor
from research.telechat2.checkpoint.whole_files import write_bin, write_ckpt
from research.telechat2.telechat_files import fsync

Weights = list[tuple[StoredTensor, str]]  # each with its name in the output

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def require_new(target: Path, is_folder: bool, source: Path) -> None:
    """Refuse a target that exists, or that would mix its tensors with those of the source.

    Raises:
        ValueError: with what is in the way.
    """
    if is_folder:
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target} is a file; expected a folder, or a path that does not exist yet")
        there = [*sorted(target.glob("[!.]*.safetensors*")), *target.glob("model.ckpt")]
        if there:
            raise ValueError(
                f"{target} already holds {there[0].name}"
                + (" (it is the input)" if target.resolve() == source.resolve() else "")
                + "; nothing is overwritten: give another folder, or delete the old checkpoint"
            )
    elif target.exists():
        same = " (it is the input)" if target.resolve() == source.resolve() else ""
        raise ValueError(f"{target} exists{same}; nothing is overwritten: give another path, or delete it")
    elif target.suffix == ".safetensors" and target.parent.resolve() == source.resolve():
        raise ValueError(
            f"{target} would lie among the files it is converted from; give a path in another folder"
        )


def plan_shards(folder: Path, weights: Weights, dtype: str | None, limit: int) -> dict[Path, Weights]:
    """Deal weights in order to files of at most ``limit`` bytes, or of one weight.

    One file is ``model.safetensors``; more than one are named ``model-00001-of-00002.safetensors`` and so on.
    """
    shards: list[Weights] = [[]]
    room = limit
    for tensor, name in weights:
        if shards[-1] and tensor.nbytes(dtype) > room:
            shards.append([])
            room = limit
        shards[-1].append((tensor, name))
        room -= tensor.nbytes(dtype)
    if len(shards) == 1:
        return {folder / SINGLE_FILE: weights}
    total = len(shards)
    return {
        folder / f"model-{number:05d}-of-{total:05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def write_checkpoint(
    files: dict[Path, Weights],
    dtype: str | None,
    framework: str,
    before_commit: Callable[[Path], None],
    beside: dict[Path, bytes],
) -> None:
    """Write files of one folder, and an index when they are several: all of them, or none on failure.

    ``beside``: further files of the folder, with their content.
    ``dtype`` None keeps each tensor's own; ``framework`` (pt or ms) is noted in safetensors headers;
    ``before_commit(folder)`` runs when all data is on the disk and nothing has its final name yet.

    Raises:
        ValueError: too little room on the disk, or a value that ``dtype`` cannot hold.
    """
    folder = next(iter(files)).parent
    nbytes = {file: sum(tensor.nbytes(dtype) for tensor, _ in weights) for file, weights in files.items()}
    index = [folder / INDEX_FILE] if len(files) > 1 else []
    with _new_files(folder, [*beside, *files, *index], sum(nbytes.values())) as temporary:
        progress = tqdm(
            total=sum(nbytes.values()), unit="B", unit_scale=True, desc="converting", disable=None
        )
        with progress:
            for file, weights in files.items():
                _write_file(temporary[file], weights, dtype, framework, progress)
        for file, content in beside.items():
            temporary[file].write_bytes(content)
        for file in index:
            weight_map = {name: part.name for part, weights in files.items() for _, name in weights}
            content = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map}
            temporary[file].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        before_commit(folder)


def _write_file(file: Path, weights: Weights, dtype: str | None, framework: str, progress: tqdm) -> None:
    if file.suffix != ".safetensors":
        write = write_bin if file.suffix == ".bin" else write_ckpt

        def loaded() -> Iterator[tuple[str, str, tuple[int, ...], bytearray]]:
            for tensor, name in weights:
                yield name, dtype or tensor.dtype, tensor.shape, tensor.read(dtype or tensor.dtype)
                progress.update(tensor.nbytes(dtype))

        write(file, loaded())
        return
    # Wide elements first: every tensor then begins at a multiple of its element's width.
    weights = sorted(weights, key=lambda weight: WIDTH[dtype or weight[0].dtype], reverse=True)
    head = {name: (dtype or tensor.dtype, tensor.shape) for tensor, name in weights}
    with open(file, "xb") as stream:
        stream.write(header_bytes(head, framework))
        for tensor, _ in weights:
            for block in tensor.blocks_as(dtype or tensor.dtype):
                progress.update(stream.write(block))
                del block  # its buffer makes room for the next one's


@contextmanager
def _new_files(folder: Path, files: list[Path], nbytes: int) -> Iterator[dict[Path, Path]]:
    """Temporary names for ``files``, which get their own, in this order, when the body has succeeded."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {file: folder / f".{os.getpid()}.part.{file.name}" for file in files}
    named = []
    try:
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise ValueError(
                f"{folder} has room for {free:,} bytes, the converted checkpoint needs {nbytes:,}; "
                "free space, or give another place"
            )
        yield temporary
        for path in temporary.values():
            fsync(path)
        for file, path in temporary.items():
            if file.exists():
                raise ValueError(f"{file} appeared during the conversion; nothing is overwritten")
            path.rename(file)
            named.append(file)
        fsync(folder)
    except BaseException:
        for path in [*temporary.values(), *named]:
            path.unlink(missing_ok=True)
        for path in created:
            with suppress(OSError):  # something else is in it
                path.rmdir()
        raise
