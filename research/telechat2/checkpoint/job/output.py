"""Which files a conversion makes: names, what goes into each, and the index; never over existing ones."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from research.telechat2.checkpoint.job.job import Options
from research.telechat2.checkpoint.job.journal import part_folder
from research.telechat2.checkpoint.storage.tensor import Weights
from research.telechat2.common.errors import UsageError

MAX_SHARD_BYTES = 5_000_000_000  # in a folder, unless another number is asked for
SINGLE_FILE = "model.safetensors"
CKPT_FILE = "model.ckpt"
INDEX_FILE = "model.safetensors.index.json"


def deal(
    target: Path,
    weights: Weights,
    options: Options,
    source: Path,
    suffixes: Iterable[str] = (".safetensors",),
    as_ckpt: bool = False,
) -> tuple[Path, dict[str, Weights]]:
    """The output folder, and its files with their weights.

    A target that ends in one of ``suffixes`` is one file; any other is a folder for ``model.safetensors``,
    for shards of at most ``options.max_shard_size`` bytes, or (``as_ckpt``) for ``model.ckpt``.

    Raises:
        UsageError: something of that kind exists, or a single file is to have a largest size.
    """
    is_folder = target.suffix not in suffixes
    if (as_ckpt or not is_folder) and options.max_shard_size is not None:
        raise UsageError(
            f"{target} is to be one file with all weights, but shards of {options.max_shard_size:,} bytes "
            "are asked for; name a folder for safetensors, or leave out --max_shard_size"
        )
    folder, files = target.parent, {target.name: weights}
    if is_folder and as_ckpt:
        folder, files = target, {CKPT_FILE: weights}
    elif is_folder:
        folder = target
        files = plan_shards(weights, options.dtype, options.max_shard_size or MAX_SHARD_BYTES)
    if not (options.resume and part_folder(folder, own_name(files)).exists()):
        if is_folder:
            require_folder(target, source, "[!.]*.safetensors*", CKPT_FILE)
        else:
            _require_new_file(target, source)
    return folder, files


def own_name(files: Mapping[str, Weights]) -> str:
    """The name of the only file, where the user chose it; empty for a folder of files of the usual names."""
    only = next(iter(files)) if len(files) == 1 else ""
    return "" if Path(only).stem == "model" or "/" in only else only


def require_folder(target: Path, source: Path | None, *taken: str) -> None:
    """Refuse a file, a folder that holds what is ``taken``, and the one that ``source`` is, or lies in.

    Raises:
        UsageError: with what is in the way.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; expected a folder, or a path that does not exist yet")
    if source and target.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise UsageError(
            f"{target} cannot receive the result: it is the input's folder, where the new files would be "
            "read in place of the old ones; give another folder"
        )
    if there := [file for pattern in taken for file in sorted(target.glob(pattern))]:
        raise UsageError(
            f"{target} already holds {there[0].name}; nothing is overwritten: give another folder, or "
            "delete the old checkpoint"
        )


def _require_new_file(target: Path, source: Path) -> None:
    if target.exists():
        same = " (it is the input)" if target.resolve() == source.resolve() else ""
        raise UsageError(f"{target} exists{same}; nothing is overwritten: give another path, or delete it")
    if target.suffix == ".safetensors" and target.parent.resolve() == source.resolve():
        raise UsageError(
            f"{target} would lie among the files it is converted from; give a path in another folder"
        )


def plan_shards(weights: Weights, dtype: str | None, limit: int) -> dict[str, Weights]:
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
        return {SINGLE_FILE: weights}
    total = len(shards)
    return {f"model-{number:05d}-of-{total:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def index_files(files: Mapping[str, Weights], dtype: str | None) -> dict[str, bytes]:
    """The index of every folder that receives more than one file: name -> content."""
    by_folder: dict[Path, dict[str, Weights]] = {}
    for name, weights in files.items():
        by_folder.setdefault(Path(name).parent, {})[Path(name).name] = weights
    indexes = {}
    for folder, shards in by_folder.items():
        if len(shards) > 1:
            total = sum(tensor.nbytes(dtype) for weights in shards.values() for tensor, _ in weights)
            weight_map = {name: shard for shard, weights in shards.items() for _, name in weights}
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            indexes[str(folder / INDEX_FILE)] = (json.dumps(content, indent=2) + "\n").encode()
    return indexes


def missing_beside(folder: Path, beside: Mapping[str, bytes], source: Path) -> dict[str, bytes]:
    """Those small files that the folder does not have yet.

    Raises:
        UsageError: it has another of that name.
    """
    missing = {}
    for name, content in beside.items():
        there = folder / name
        if not there.exists():
            missing[name] = content
        elif there.read_bytes() != content:
            raise UsageError(
                f"{there} differs from that of {source}, which belongs to the weights; nothing is "
                "overwritten: give another folder, or delete it"
            )
    return missing


def require_absent(folder: Path, names: Iterable[str]) -> None:
    """UsageError if one of these files is there."""
    for name in names:
        if (folder / name).exists():
            raise UsageError(
                f"{folder / name} exists; nothing is overwritten: give another path, or delete it"
            )


def require_room(folder: Path, nbytes: int) -> None:
    """UsageError if the disk has less room than that, beside what ``folder`` takes already."""
    taken = sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))
    free = shutil.disk_usage(folder).free
    if nbytes > free + taken:
        raise UsageError(
            f"{folder.parent} has room for {free:,} bytes, the converted checkpoint needs "
            f"{nbytes - taken:,}; free space, or give another place"
        )
