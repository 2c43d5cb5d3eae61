"""Which files a path stands for: HF folders, MindSpore files, and what MindFormers leaves after training."""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from research.telechat2.checkpoint.storage.framework_formats import read_bin, read_ckpt
from research.telechat2.checkpoint.storage.safetensors_format import read_safetensors
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.common.errors import UsageError
from research.telechat2.common.tables import listed

READERS = {".safetensors": read_safetensors, ".bin": read_bin, ".ckpt": read_ckpt}
TRACKER = "latest_checkpointed_iteration.txt"


def visible(folder: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that has some; hidden ones are unfinished downloads and conversions."""
    for pattern in patterns:
        if files := [file for file in sorted(folder.glob(pattern)) if file.name[0] != "." and file.is_file()]:
            return files
    return []


def rank_folders(path: Path) -> dict[int, Path]:
    """The folders ``rank_0`` and so on in ``path``, by number."""
    numbers = {folder.name.removeprefix("rank_"): folder for folder in path.glob("rank_*/")}
    return {int(text): numbers[text] for text in sorted(filter(str.isdecimal, numbers), key=int)}


def read_torch_source(path: Path) -> list[StoredTensor]:
    """The tensors of an HF folder (or of one of its files).

    A folder holds ``*.safetensors`` (read first) or ``pytorch_model*.bin``. UsageError where there is nothing
    to read, or files do not agree with their index or numbering.
    """
    _require_exists(path)
    for file in [path] if path.is_file() else visible(path, "adapter_model.*"):
        if file.name.startswith("adapter_model."):
            raise UsageError(
                f"{file} is an adapter of PEFT, not a model; give the folder that peft's merge_and_unload() "
                "and save_pretrained() make"
            )
    if path.is_file():
        return _read_files([path], (".safetensors", ".bin"))
    files = visible(path, "*.safetensors", "pytorch_model*.bin")
    if not files:
        raise UsageError(
            f"{path} holds {_content_of(path)}; expected *.safetensors or pytorch_model*.bin of Hugging Face"
        )
    return _read_shards(path, files)


def read_mindspore_source(path: Path) -> list[StoredTensor]:
    """The tensors of a MindSpore checkpoint.

    ``path`` is a ``.safetensors`` or ``.ckpt`` file, a folder of them, or MindFormers' ``output/checkpoint``
    (the iteration named in its tracker file, or its only ``rank_0``). UsageError unless it holds just one.
    """
    _require_exists(path)
    if path.is_file():
        return _read_files([path], (".safetensors", ".ckpt"))
    folder = _training_folder(path)
    files = visible(folder, "*.safetensors", "*.ckpt")
    if not files:
        raise UsageError(
            f"{folder} holds {_content_of(folder)}; expected *.safetensors or *.ckpt, or such a file's path"
        )
    steps = [file for file in files if re.search(r"-[0-9]+_[0-9]+\.(safetensors|ckpt)$", file.name)]
    if len(files) > 1 and (steps or files[0].suffix == ".ckpt"):
        raise UsageError(f"{folder} holds several checkpoints ({_names(files)}); name the file to convert")
    ranks = [match for file in files if (match := re.search(r"-model-[0-9]{7}-([0-9]{7})\.", file.name))]
    if any(int(match[1]) > 1 for match in ranks):
        raise UsageError(
            f"{folder} holds what {int(ranks[0][1])} devices saved: {_names(files)}. Give one of the -model- "
            "files if each held the whole model (data parallel); if not, merge them first"
        )
    return _read_shards(folder, files)


def latest_iteration(path: Path) -> Path:
    """The ``iteration_*`` folder that MindFormers' tracker in ``path`` names; ``path`` if it has no tracker.

    UsageError if that folder is absent.
    """
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    number = tracker.read_text(encoding="utf-8", errors="replace").strip()
    folder = path / f"iteration_{number:0>8}"
    if not (number.isascii() and number.isdigit() and folder.is_dir()):
        beside = f"no folder {folder.name[:40]} is beside it"
        raise UsageError(
            f"{tracker} names iteration {number[:20]!r}, but {beside}; give an iteration's folder"
        )
    return folder


def _training_folder(path: Path) -> Path:
    """Descend from MindFormers' output/checkpoint to the one folder that holds a checkpoint."""
    if (folder := latest_iteration(path)) != path:
        return folder
    ranks = list(rank_folders(path).values())
    if len(ranks) > 1:
        raise UsageError(
            f"{path} holds {len(ranks)} folders rank_*, a sharded checkpoint; merge it first with "
            "research/telechat2/transform_ckpt.py"
        )
    return ranks[0] if ranks else path


def _read_shards(folder: Path, files: Sequence[Path]) -> list[StoredTensor]:
    """Read files that together are one checkpoint: as their index says, or as their names count."""
    base = "pytorch_model.bin" if files[0].suffix == ".bin" else "model.safetensors"
    index_file = folder / f"{base}.index.json"
    if not index_file.is_file():
        _check_numbering(folder, files)
        return _read_files(files, READERS)
    expected = _read_index(index_file)
    here = {file.name for file in files}
    absent, extra = sorted(expected.keys() - here), sorted(here - expected.keys())
    if absent or extra:
        raise UsageError(
            f"{index_file} and the files beside it differ."
            + (f" {len(absent)} of its files are absent: {listed(absent)}. Download them." if absent else "")
            + (f" {len(extra)} files are not in it: {listed(extra)}. Move them elsewhere." if extra else "")
        )
    tensors = _read_files(files, READERS)
    held = defaultdict(set)
    for tensor in tensors:
        held[tensor.file.name].add(tensor.name)
    lacking, unlisted = (
        [f"{name} ({file})" for file in sorted(some) for name in sorted(some[file] - others[file])]
        for some, others in ((expected, held), (held, expected))
    )
    if lacking or unlisted:
        raise UsageError(
            f"{index_file} and its files do not agree. They lack: {listed(lacking) or 'nothing'}; it lacks: "
            f"{listed(unlisted) or 'nothing'}. Download the index and the files again, from one release"
        )
    return tensors


def _read_index(file: Path) -> dict[str, set[str]]:
    """The index of a sharded checkpoint, by file: file name -> names of its tensors."""
    try:
        pairs = list(json.loads(file.read_text(encoding="utf-8-sig"))["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pairs = []
    tensors = defaultdict(set)
    for name, shard in pairs:
        if not isinstance(shard, str) or "/" in shard or "\\" in shard:
            raise UsageError(f"{file} says that {name} is in {shard!r}; expected a file beside it")
        tensors[shard].add(name)
    if not tensors:
        raise UsageError(f'{file} is no index of weights; expected JSON: {{"weight_map": {{name: file}}}}')
    return tensors


def _check_numbering(folder: Path, files: Sequence[Path]) -> None:
    """Without an index, names such as model-00002-of-00003 still tell whether files are missing."""
    numbers = [re.search(r"-([0-9]{5})-of-([0-9]{5})\.[a-z]+$", file.name) for file in files]
    totals = {int(match[2]) for match in numbers if match}
    if totals and (len(totals) > 1 or not all(numbers) or len(files) != min(totals)):
        parts = " or ".join(map(str, sorted(totals)))
        raise UsageError(
            f"{folder} holds {len(files)} files of a checkpoint in {parts} parts, no index: {_names(files)}. "
            "Download what is missing, move away what does not belong"
        )


def _read_files(files: Sequence[Path], allowed: Collection[str]) -> list[StoredTensor]:
    for file in files:
        if file.suffix not in allowed:
            raise UsageError(f"{file} ends in {file.suffix!r}; expected {' or '.join(allowed)}, or a folder")
    return [tensor for file in files for tensor in READERS[file.suffix](file)]


def _require_exists(path: Path) -> None:
    if not path.exists():
        hub = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
        advice = "; names of models on a hub are not looked up, download the model first" if hub else ""
        raise UsageError(f"{path} does not exist; expected a checkpoint file or folder{advice}")


def _names(files: Sequence[Path]) -> str:
    return listed(file.name for file in files)


def _content_of(folder: Path) -> str:
    return listed(sorted(entry.name for entry in folder.iterdir())) or "nothing"
