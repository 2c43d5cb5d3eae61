"""The files of a sharded checkpoint: which belong to one step of a run, and writing new ones."""

import re
from itertools import islice
from pathlib import Path

from research.telechat2.checkpoint.storage.folders import READERS, latest_iteration
from research.telechat2.checkpoint.storage.safetensors_format import CODES, ITEM_BYTES
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.common.errors import UsageError

Shards = list[dict[str, StoredTensor]]  # of each rank, its tensors by name

_CODE = {name: code for code, name in CODES.items()} | {
    "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_STEP = re.compile(r"-([0-9]+)_([0-9]+)\.(?:safetensors|ckpt)$")  # epoch and step, by CheckpointMonitor
_OF_ITERATION = re.compile(r"-(?:model|opt)-([0-9]{7})-([0-9]{7})\.safetensors$")


def width_of(dtype: str) -> int:
    """Bytes of an element of any dtype that a checkpoint can hold."""
    return ITEM_BYTES[_CODE.get(dtype, dtype)]


def saved_shards(folder: Path, device_num: int, reason: str) -> Shards:
    """What each of ``device_num`` ranks saved: in ``rank_*`` folders, or in MindFormers' format 2.

    ``reason`` tells in an error's sentence why there must be so many.

    Raises:
        UsageError: other ranks than these, a rank without a file of the newest step, or a broken file.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; expected the checkpoint folder that all ranks saved into")
    folder = latest_iteration(folder)
    files = _in_rank_folders(folder) or _of_iteration(folder)
    if not files:
        raise UsageError(
            f"{folder} holds no rank_* folders and no *-model-0000000-*.safetensors; expected what "
            f"{device_num} devices saved, such as output/checkpoint"
        )
    absent = list(islice((f"rank_{rank}" for rank in range(device_num) if rank not in files), 10))
    if absent or len(files) != device_num:
        what = f"lacks {', '.join(absent)}" if absent else f"holds {len(files)} ranks"
        raise UsageError(
            f"{folder} {what}; expected rank_0 to rank_{device_num - 1}, since {reason}. Copy the files of "
            "all devices there"
        )
    return [_read(files[rank]) for rank in range(device_num)]


def _in_rank_folders(folder: Path) -> dict[int, list[Path]]:
    """Rank -> its file of the newest step."""
    names = {rank: re.fullmatch(r"rank_([0-9]+)", rank.name) for rank in folder.glob("rank_*")}
    found = {int(match[1]): _checkpoint_files(rank) for rank, match in names.items() if match}
    steps = {
        tuple(map(int, match.groups()))
        for files in found.values()
        for file in files
        if (match := _STEP.search(file.name))
    }
    newest = max(steps, default=None)
    for rank, files in sorted(found.items()):
        of_step = [
            file
            for file in files
            if newest is None
            or ((match := _STEP.search(file.name)) and tuple(map(int, match.groups())) == newest)
        ]
        if len(of_step) != 1:
            step = f"of epoch {newest[0]}, step {newest[1]}, the newest" if newest else "with weights"
            raise UsageError(
                f"{folder / f'rank_{rank}'} holds {len(of_step)} files {step} that a rank has; expected one. "
                "Copy what is missing, or, if not all ranks saved that step, move its files elsewhere"
            )
        found[rank] = of_step
    return found


def _checkpoint_files(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.glob("*")) if not file.name.startswith("."))
    return [file for file in files if file.suffix in (".safetensors", ".ckpt")]


def _of_iteration(folder: Path) -> dict[int, list[Path]]:
    """Rank -> its files of weights and of the optimizer's states."""
    found: dict[int, list[Path]] = {}
    with_states: set[int] = set()
    for file in _checkpoint_files(folder):
        if match := _OF_ITERATION.search(file.name):
            found.setdefault(int(match[1]), []).append(file)
            if "-opt-" in match[0]:
                with_states.add(int(match[1]))
    if with_states and with_states != found.keys():
        raise UsageError(
            f"{folder} holds the optimizer's states (*-opt-*) of some ranks, but not of "
            f"{sorted(found.keys() - with_states)[:10]}; expected those of all or of none. Copy the others"
        )
    return found


def _read(files: list[Path]) -> dict[str, StoredTensor]:
    tensors = {}
    for file in files:
        for tensor in READERS[file.suffix](file):
            if _CODE.get(tensor.dtype, tensor.dtype) not in ITEM_BYTES:
                raise UsageError(
                    f"{file} holds {tensor.name} as {tensor.dtype}, which is no dtype of tensors"
                )
            tensors[tensor.name] = tensor
    return tensors
