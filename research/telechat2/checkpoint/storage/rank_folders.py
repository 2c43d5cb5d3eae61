"""The files of a sharded checkpoint: which of them belong to one step of a run."""

import re
from itertools import islice
from pathlib import Path

from research.telechat2.checkpoint.storage.folders import READERS, latest_iteration, rank_folders, visible
from research.telechat2.checkpoint.storage.safetensors_format import CODES
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.common.errors import UsageError
from research.telechat2.common.tables import listed

Shards = list[dict[str, StoredTensor]]  # of each rank, its tensors by name

_STEP = re.compile(r"-([0-9]+)_([0-9]+)\.(?:safetensors|ckpt)$")  # epoch and step, by CheckpointMonitor
_OF_ITERATION = re.compile(r"-(model|opt)-([0-9]{7})-([0-9]{7})\.safetensors$")


def saved_shards(folder: Path, device_num: int, reason: str) -> Shards:
    """What each of ``device_num`` ranks saved: in ``rank_*`` folders, or in MindFormers' format 2.

    ``reason`` tells in an error why there must be so many. UsageError on other ranks than these, a rank
    without a file of the newest step, or a broken file.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; expected the checkpoint folder that all ranks saved into")
    folder = latest_iteration(folder)
    files = _in_rank_folders(folder) or _of_iteration(folder)
    if not files:
        raise UsageError(
            f"{folder} holds neither rank_* folders nor *-model-0000000-*.safetensors; expected what "
            f"{device_num} devices saved, such as output/checkpoint"
        )
    absent = list(islice((f"rank_{rank}" for rank in range(device_num) if rank not in files), 10))
    if absent or len(files) != device_num:
        what = f"lacks {', '.join(absent)}" if absent else f"holds {len(files)} ranks"
        raise UsageError(
            f"{folder} {what}; expected rank_0 to rank_{device_num - 1}: {reason}. Copy all files there"
        )
    return [_read(files[rank]) for rank in range(device_num)]


def _in_rank_folders(folder: Path) -> dict[int, list[Path]]:
    """Rank -> its file of the newest step."""
    found = {rank: _checkpoint_files(files) for rank, files in rank_folders(folder).items()}
    newest = max(filter(None, (_step(file) for files in found.values() for file in files)), default=None)
    for rank, files in sorted(found.items()):
        of_step = [file for file in files if _step(file) == newest]
        if len(of_step) != 1:
            step = f"of epoch {newest[0]}, step {newest[1]}, the newest" if newest else "with weights"
            raise UsageError(
                f"{folder / f'rank_{rank}'} holds {len(of_step)} files {step}; expected one. Copy what is "
                "missing, or, if not all ranks saved that step, move its files elsewhere"
            )
        found[rank] = of_step
    return found


def _step(file: Path) -> tuple[int, int] | None:
    """Epoch and step that a file's name tells."""
    match = _STEP.search(file.name)
    return (int(match[1]), int(match[2])) if match else None


def _checkpoint_files(folder: Path) -> list[Path]:
    return [file for file in visible(folder, "*") if file.suffix in (".safetensors", ".ckpt")]


def _of_iteration(folder: Path) -> dict[int, list[Path]]:
    """Rank -> its files of weights and of the optimizer's states."""
    found: dict[int, list[Path]] = {}
    with_states: set[int] = set()
    for file in _checkpoint_files(folder):
        if match := _OF_ITERATION.search(file.name):
            found.setdefault(int(match[2]), []).append(file)
            if match[1] == "opt":
                with_states.add(int(match[2]))
    if with_states and with_states != found.keys():
        lacking = listed(sorted(found.keys() - with_states))
        raise UsageError(f"{folder} lacks the optimizer's states (*-opt-*) of ranks {lacking}; copy them")
    return found


def _read(files: list[Path]) -> dict[str, StoredTensor]:
    tensors = {tensor.name: tensor for file in files for tensor in READERS[file.suffix](file)}
    if odd := next((tensor for tensor in tensors.values() if tensor.dtype not in CODES), None):
        raise UsageError(f"{odd.file} holds {odd.name} as {odd.dtype}, which is no dtype of tensors")
    return tensors
