"""Sharded checkpoints of a cluster: merged, or re-sharded for another cluster.

MindFormers' ``transform_ckpt.py`` does this too, byte for byte, where nothing is wrong. Where a rank's file
is missing, cut off, or of another step, it writes what is left, and ends with "Transform succeed!". Here
every slice is looked up before anything is written, and a few slices are in memory at a time.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from research.telechat2.checkpoint.cluster.strategies import Box, Cluster, Layout, read_strategies
from research.telechat2.checkpoint.cluster.write_ranks import write_ranks
from research.telechat2.checkpoint.job.output import require_folder
from research.telechat2.checkpoint.layouts.tensor_parallel import require_same
from research.telechat2.checkpoint.plan import make_plan
from research.telechat2.checkpoint.storage.folders import read_mindspore_source
from research.telechat2.checkpoint.storage.rank_folders import Shards, saved_shards
from research.telechat2.checkpoint.storage.safetensors_format import BYTES
from research.telechat2.checkpoint.storage.tensor import Blocks, StoredTensor, blocks_of
from research.telechat2.checkpoint.table import ignored_as
from research.telechat2.common.errors import UsageError
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
        gathered = np.empty([stop - start for start, stop in box], f"V{BYTES[self.dtype]}")
        for place, tensor in self.parts:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(place, box, strict=True)]
            if any(first >= last for first, last in common):
                continue
            into = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box, strict=True))
            within = [(a - c, b - c) for (a, b), (c, _) in zip(common, place, strict=True)]
            gathered[into] = _read_rows(tensor, within)
        return blocks_of(gathered.view(np.uint8).data, start, stop)


def _read_rows(tensor: StoredTensor, box: list[tuple[int, int]]) -> NDArray[np.void]:
    """The elements within ``box``; only the rows of the first axis are read that hold some."""
    width = BYTES[tensor.dtype]
    if not box:
        return np.frombuffer(tensor.read(), f"V{width}").reshape(())
    (first, last), *others = box
    row = prod(tensor.shape[1:]) * width
    content = bytearray()
    for block in tensor.blocks(first * row, last * row):
        content += block
    rows = np.frombuffer(content, f"V{width}").reshape(last - first, *tensor.shape[1:])
    return rows[(slice(None), *(slice(*bounds) for bounds in others))]


def transform(
    src_ckpt_dir: str | Path,
    dst_ckpt_dir: str | Path,
    prefix: str,
    src_ckpt_strategy: str | Path | None = None,
    dst_ckpt_strategy: str | Path | None = None,
) -> str:
    """Write a checkpoint anew for another cluster, as ``rank_<r>/<prefix><r>.safetensors``.

    Returns a report of what was read and written.

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
            "neither --src_ckpt_strategy nor --dst_ckpt_strategy is given; the first merges what a cluster "
            "saved, the second cuts a checkpoint for a cluster, both together do one after the other"
        )
    source, folder = Path(src_ckpt_dir), Path(dst_ckpt_dir)
    require_folder(folder, None, "rank_*")
    cluster = read_strategies(src_ckpt_strategy) if src_ckpt_strategy else None
    target = read_strategies(dst_ckpt_strategy) if dst_ckpt_strategy else None
    if cluster is None:
        shards = [{tensor.name: tensor for tensor in read_mindspore_source(source)}]
    else:
        reason = (
            f"the strategies are of {cluster.device_num} devices (they must be those of the same run, of all "
            "stages)"
        )
        shards = saved_shards(source, cluster.device_num, reason)
    left_out = {name for shard in shards for name in shard if name.startswith(ACCUMULATED)}
    sliced, copied = _wholes(shards, cluster, left_out)
    merged = [whole.cut(whole.box) for whole in (sliced | copied).values()]
    plan = make_plan(merged, "mindspore", None, str(source))  # wrong strategies do not give a model's shapes
    ranks = _cut(sliced, copied, target)
    written = write_ranks(folder, prefix, ranks)
    if (prompt_format := prompt_formats.find(source)) is not None:
        prompt_formats.write(folder, prompt_format)
    return "\n".join(
        [
            f"read {source}, saved by {len(shards)} devices",
            f"wrote {sum(map(len, ranks)):,} tensors, {written:,} bytes, {len(ranks)} files, to {folder}",
            f"model: {plan.sizes.describe()}",
            f"not in the strategies, the same on all ranks, copied: {listed(sorted(copied), 5) or 'nothing'}",
            f"left out: {len(left_out)} accumulated gradients" if left_out else "left out: nothing",
        ]
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
            f"{name} is not complete: none of the ranks {listed(holders[empty[0]])} holds its part "
            f"{list(empty[0])} of {list(layout.parts)}. Copy their files again"
        )
    kinds = Counter(shards[rank][name].kind for having in held.values() for rank in having)
    if len(kinds) > 1:
        usual, other = (kind for kind, _ in kinds.most_common(2))
        odd = next(rank for rank in ranks if name in shards[rank] and shards[rank][name].kind == other)
        raise UsageError(
            f"{shards[odd][name].file} holds {name} as {_described(other)}, other ranks hold theirs as "
            f"{_described(usual)}; expected slices of one shape. They are of different runs"
        )
    dtype, local = next(iter(kinds))
    if len(local) != len(layout.parts):
        raise UsageError(
            f"{name} has {len(local)} axes, {list(local)}, but the strategies split {len(layout.parts)}; "
            "they are of another model. Give those of the run that saved the checkpoint"
        )
    shape = tuple(length * parts for length, parts in zip(local, layout.parts, strict=True))
    parts = tuple((layout.box(shape, place), shards[ranks[0]][name]) for place, ranks in held.items())
    return Whole(name, dtype, shape, parts)


def _same_everywhere(name: str, shards: Shards) -> Whole:
    copies = [shard[name] for shard in shards if name in shard]
    reason = "no strategy file has it, so the strategies are of another model, or some files of another step"
    require_same(copies, reason)
    first = copies[0]
    return Whole(name, first.dtype, first.shape, ((_box_of(first.shape), first),))


def _require_all(expected: set[str], found: Mapping[str, Whole], lack: str) -> None:
    """Refuse weights that are absent, and the optimizer's states unless all of them are."""
    absent = sorted(name for name in expected - found.keys() if not name.startswith(ACCUMULATED))
    if not any(map(_is_state, found)):  # saved without them
        absent = [name for name in absent if not _is_state(name)]
    if absent:
        raise UsageError(
            f"{lack} {len(absent)} of the {len(expected)} tensors of the strategies: {listed(absent)}. "
            "The strategies are of another model, or the checkpoint is not complete"
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
            f"the strategies of the target do not know {len(unknown)} tensors of the checkpoint: "
            f"{listed(unknown)}. They are of another model, or miss a stage"
        )
    _require_all(target.names, sliced, "the checkpoint lacks")
    ranks: list[list[StoredTensor]] = []
    for layouts in target.stages:
        copies = [whole.cut(whole.box) for name, whole in copied.items() if _belongs(name, layouts)]
        stage = [list(copies) for _ in range(target.stage_size)]
        for name in [name for name in layouts if name in sliced]:
            whole, layout = sliced[name], layouts[name]
            if len(whole.shape) != len(layout.parts) or any(
                length % parts for length, parts in zip(whole.shape, layout.parts, strict=False)
            ):
                raise UsageError(
                    f"{name}, {list(whole.shape)}, cannot be cut into {list(layout.parts)} parts as the "
                    "strategies of the target say; they are of another model"
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


def _described(kind: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind[0]} {list(kind[1])}"
