"""Sharded checkpoints of a cluster: merged, or re-sharded for another cluster.

The result is that of MindFormers' ``transform_ckpt.py``, byte for byte, which does not notice that a rank's
file is missing, cut off, or of another step. Here every slice is looked up before anything is written.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from research.telechat2.checkpoint.cluster.strategies import Box, Cluster, Layout, read_strategies
from research.telechat2.checkpoint.job.copy import lay_out
from research.telechat2.checkpoint.job.journal import staging
from research.telechat2.checkpoint.job.output import require_folder, require_room
from research.telechat2.checkpoint.layouts.tensor_parallel import require_same
from research.telechat2.checkpoint.plan import make_plan
from research.telechat2.checkpoint.storage.folders import read_mindspore_source
from research.telechat2.checkpoint.storage.rank_folders import Shards, saved_shards
from research.telechat2.checkpoint.storage.safetensors_format import BYTES
from research.telechat2.checkpoint.storage.tensor import Blocks, StoredTensor, blocks_of, gathered
from research.telechat2.checkpoint.table import ignored_as
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import fsync
from research.telechat2.common.tables import listed
from research.telechat2.text import prompt_format as prompt_formats

ACCUMULATED = "accu_grads."  # gradients of a step that is under way


@dataclass(frozen=True)
class Whole:
    """A whole tensor, and where its parts lie: of each distinct part, the indices and one rank's slice."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Box, StoredTensor], ...]

    @property
    def box(self) -> Box:
        """All indices."""
        return _box_of(self.shape)

    def cut(self, box: Box) -> StoredTensor:
        """The part within ``box``; its bytes are gathered when they are asked for."""
        shape = tuple(stop - start for start, stop in box)
        if len(self.parts) == 1 and shape == self.shape:
            return self.parts[0][1]
        return StoredTensor(self.name, self.dtype, shape, self.parts[0][1].file, partial(self._blocks, box))

    def _blocks(self, box: Box, start: int = 0, stop: int | None = None) -> Blocks:
        array = np.empty([stop - start for start, stop in box], f"V{BYTES[self.dtype]}")
        for place, tensor in self.parts:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(place, box, strict=True)]
            if any(first >= last for first, last in common):
                continue
            into = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box, strict=True))
            within = [(a - c, b - c) for (a, b), (c, _) in zip(common, place, strict=True)]
            array[into] = _read_rows(tensor, within)
        return blocks_of(array.view(np.uint8).data, start, stop)


def _read_rows(tensor: StoredTensor, box: list[tuple[int, int]]) -> NDArray[np.void]:
    """The elements within ``box``; only the rows of the first axis are read that hold some."""
    width = BYTES[tensor.dtype]
    if not box:
        return np.frombuffer(tensor.read(), f"V{width}").reshape(())
    (first, last), *others = box
    row = prod(tensor.shape[1:]) * width
    content = np.frombuffer(gathered(tensor.blocks(first * row, last * row)), f"V{width}")
    rows = content.reshape(last - first, *tensor.shape[1:])
    return rows[(slice(None), *(slice(*bounds) for bounds in others))]


def transform(
    src_ckpt_dir: str | Path,
    dst_ckpt_dir: str | Path,
    prefix: str,
    src_ckpt_strategy: str | Path | None = None,
    dst_ckpt_strategy: str | Path | None = None,
) -> str:
    """Write a checkpoint anew for another cluster, as ``rank_<r>/<prefix><r>.safetensors``; returns a report.

    Args:
        src_ckpt_dir: with strategies, a folder of ``rank_*`` folders, of which the newest step is taken, or
            what the section ``checkpoint:`` saves; without, a whole checkpoint (see read_mindspore_source).
        dst_ckpt_dir: receives the folders ``rank_*``, and must not hold any.
        prefix: of the files' names.
        src_ckpt_strategy: strategies of the cluster that saved it; None: it is whole.
        dst_ckpt_strategy: those of the cluster that is to load it; None: one device, ``rank_0``.

    Raises:
        UsageError: slices that are missing, of different steps, dtypes or shapes, strategies of another run
            or model, or a target that exists. Nothing is written then.
    """
    if not re.fullmatch(r"[^/\\\0]*", prefix):
        raise UsageError(f"--prefix is {prefix!r}; expected the beginning of a file's name, without slashes")
    if not (src_ckpt_strategy or dst_ckpt_strategy):
        raise UsageError(
            "neither --src_ckpt_strategy nor --dst_ckpt_strategy is given; expected the strategies of the "
            "cluster that saved the checkpoint, of the one that is to load it, or both"
        )
    source, folder = Path(src_ckpt_dir), Path(dst_ckpt_dir)
    require_folder(folder, None, "rank_*")
    cluster = read_strategies(src_ckpt_strategy) if src_ckpt_strategy else None
    target = read_strategies(dst_ckpt_strategy) if dst_ckpt_strategy else None
    if cluster is None:
        shards = [{tensor.name: tensor for tensor in read_mindspore_source(source)}]
    else:
        reason = f"the strategies are of {cluster.device_num} devices, which must be all of the same run"
        shards = saved_shards(source, cluster.device_num, reason)
    left_out = {name for shard in shards for name in shard if name.startswith(ACCUMULATED)}
    sliced, copied = _wholes(shards, cluster, left_out)
    merged = [whole.cut(whole.box) for whole in (sliced | copied).values()]
    plan = make_plan(merged, "mindspore", None, str(source))  # wrong strategies do not give a model's shapes
    ranks = _cut(sliced, copied, target)
    written = _write(folder, prefix, ranks)
    if (prompt_format := prompt_formats.find(source)) is not None:
        prompt_formats.write(folder, prompt_format)
    return (
        f"read {source}, saved by {len(shards)} devices\n"
        f"wrote {sum(map(len, ranks)):,} tensors, {written:,} bytes, {len(ranks)} files, to {folder}\n"
        f"model: {plan.sizes.describe()}\n"
        f"not in the strategies, the same on all ranks, copied: {listed(sorted(copied), 5) or 'nothing'}\n"
        f"left out: {f'{len(left_out)} accumulated gradients' if left_out else 'nothing'}"
    )


def _wholes(
    shards: Shards, cluster: Cluster | None, left_out: set[str]
) -> tuple[dict[str, Whole], dict[str, Whole]]:
    """The tensors that the strategies split, and those that they do not know."""
    sliced: dict[str, Whole] = {}
    copied: dict[str, Whole] = {}
    for name in dict.fromkeys(name for shard in shards for name in shard):
        if name in left_out:
            continue
        if cluster and (stage := cluster.stage_of(name)) is not None:
            sliced[name] = _merged(name, shards, cluster, stage)
        elif cluster is None and (_is_state(name) or not ignored_as(name, "mindspore")):
            sliced[name] = _same_everywhere(name, shards)
        else:
            copied[name] = _same_everywhere(name, shards)
    if cluster:
        _require_all(cluster.names, sliced, "the shards lack")
    return sliced, copied


def _merged(name: str, shards: Shards, cluster: Cluster, stage: int) -> Whole:
    layout, ranks = cluster.stages[stage][name], cluster.ranks_of(stage)
    holders: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, place in zip(ranks, layout.places(), strict=True):
        holders[place].append(rank)
    held = {place: [rank for rank in ranks if name in shards[rank]] for place, ranks in holders.items()}
    if empty := [place for place in held if not held[place]]:
        raise UsageError(
            f"{name} lacks its part {list(empty[0])} of {list(layout.parts)}, of ranks "
            f"{listed(holders[empty[0]])}; copy their files again"
        )
    kinds = Counter(shards[rank][name].kind for having in held.values() for rank in having)
    if len(kinds) > 1:
        usual, other = (kind for kind, _ in kinds.most_common(2))
        odd = next(rank for rank in ranks if name in shards[rank] and shards[rank][name].kind == other)
        raise UsageError(
            f"{shards[odd][name].file} holds {name} as {other[0]} {list(other[1])}, others as {usual[0]} "
            f"{list(usual[1])}; give the files of one run"
        )
    dtype, local = next(iter(kinds))
    if len(local) != len(layout.parts):
        raise UsageError(
            f"{name} has {len(local)} axes, {list(local)}, but the strategies split {len(layout.parts)}; "
            "give those of the run that saved the checkpoint"
        )
    shape = tuple(length * parts for length, parts in zip(local, layout.parts, strict=True))
    parts = tuple((layout.box(shape, place), shards[ranks[0]][name]) for place, ranks in held.items())
    return Whole(name, dtype, shape, parts)


def _same_everywhere(name: str, shards: Shards) -> Whole:
    copies = [shard[name] for shard in shards if name in shard]
    require_same(copies, "no strategy has it: they are of another model, or files of another step")
    first = copies[0]
    return Whole(name, first.dtype, first.shape, ((_box_of(first.shape), first),))


def _require_all(expected: set[str], found: Mapping[str, Whole], lack: str) -> None:
    """Refuse weights that are absent, and the optimizer's states unless all of them are."""
    absent = sorted(name for name in expected - found.keys() if not name.startswith(ACCUMULATED))
    if not any(map(_is_state, found)):  # saved without them
        absent = [name for name in absent if not _is_state(name)]
    if absent:
        raise UsageError(
            f"{lack} {len(absent)} of the {len(expected)} tensors of the strategies: {listed(absent)}. Give "
            "the strategies of this model, and all files"
        )


def _is_state(name: str) -> bool:
    return ignored_as(name, "mindspore") == "optimizer states"


def _cut(
    sliced: Mapping[str, Whole], copied: Mapping[str, Whole], target: Cluster | None
) -> list[list[StoredTensor]]:
    """What each rank of the target stores."""
    if target is None:
        return [[whole.cut(whole.box) for whole in (*sliced.values(), *copied.values())]]
    if unknown := sorted(sliced.keys() - target.names):
        raise UsageError(
            f"the strategies of the target lack {len(unknown)} tensors of the checkpoint: {listed(unknown)}. "
            "Give those of this model, of all stages"
        )
    _require_all(target.names, sliced, "the checkpoint lacks")
    ranks: list[list[StoredTensor]] = []
    for layouts in target.stages:
        copies = [whole.cut(whole.box) for name, whole in copied.items() if _belongs(name, layouts)]
        stage = [list(copies) for _ in range(target.stage_size)]
        for name in [name for name in layouts if name in sliced]:
            whole, layout = sliced[name], layouts[name]
            uneven = [n % parts for n, parts in zip(whole.shape, layout.parts, strict=False)]
            if len(whole.shape) != len(layout.parts) or any(uneven):
                raise UsageError(
                    f"{name}, {list(whole.shape)}, cannot be cut into {list(layout.parts)} parts, as the "
                    "strategies of the target say; give those of this model"
                )
            for tensors, place in zip(stage, layout.places(), strict=True):
                tensors.append(whole.cut(layout.box(whole.shape, place)))
        ranks += stage
    return ranks


def _belongs(name: str, layouts: Mapping[str, Layout]) -> bool:
    """Whether a stage needs a tensor that no strategy knows: not if it is one of another stage's layers."""
    layer = re.match(r"model\.layers\.[0-9]+\.", name)
    return layer is None or any(other.startswith(layer[0]) for other in layouts)


def _box_of(shape: tuple[int, ...]) -> Box:
    return tuple((0, length) for length in shape)


def _write(folder: Path, prefix: str, ranks: list[list[StoredTensor]]) -> int:
    """Write the files of all ranks or none, and return the tensors' bytes.

    The files get their names when all are on the disk, that of rank 0 last.
    """
    outputs = []
    for rank, tensors in enumerate(ranks):
        weights = [(tensor, tensor.name) for tensor in tensors]
        outputs.append(lay_out(f"rank_{rank}/{prefix}{rank}.safetensors", weights, None, {"format": "ms"}))
    total = sum(output.size - len(output.head) for output in outputs)
    with staging(folder, str(os.getpid()), {}, resume=False) as stage:
        require_room(stage.path, total)
        with tqdm(total=total, unit="B", unit_scale=True, desc="transforming", disable=None) as progress:
            for output in outputs:
                file = stage.path / output.name
                file.parent.mkdir()
                with open(file, "xb") as stream:
                    stream.write(output.head)
                    for placed in output.tensors:
                        for block in placed.tensor.blocks():
                            progress.update(stream.write(block))
                fsync(file)
        stage.name_all([output.name for output in reversed(outputs)])
    return total
