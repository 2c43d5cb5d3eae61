"""Which part of each parameter a rank of a cluster stores: by MindSpore's strategy files, or as compiled.

Training leaves one file per rank in ``output/strategy``, the dry run one per stage of the pipeline. Ranks of
a stage have the same layouts, which tell by the rank's place in the device matrix what it stores.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.checkpoint.storage.views import part_of
from research.telechat2.common.errors import UsageError

# Of a communication group: this rank's number in it, and its size.
GroupPlace = Callable[[str], tuple[int, int]]
Box = tuple[tuple[int, int], ...]  # of each axis, the first index and the one after the last


@dataclass(frozen=True)
class Layout:
    """How the ranks of a stage share a parameter.

    Attributes:
        device_matrix: the stage's ranks, row by row.
        axes: of each of the tensor's axes, the matrix's axes that split it, counted from the matrix's end;
            the first is the coarsest. Empty: not split.
        optimizer_parts: ranks that have the same slice share it out among themselves along the first axis, in
            groups of so many neighbours; -1: all of them; 0: each stores the whole slice.
    """

    device_matrix: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    optimizer_parts: int

    @property
    def parts(self) -> tuple[int, ...]:
        """Into how many parts each axis is split."""
        return _places(self)[0]

    def places(self) -> tuple[tuple[int, ...], ...]:
        """Of each rank of the stage, which part of each axis it stores."""
        return _places(self)[1]

    def box(self, shape: tuple[int, ...], place: tuple[int, ...]) -> Box:
        """The indices of the part at ``place`` of a tensor of ``shape``."""
        sizes = [length // parts for length, parts in zip(shape, self.parts, strict=True)]
        return tuple((index * size, (index + 1) * size) for index, size in zip(place, sizes, strict=True))


@dataclass(frozen=True)
class Cluster:
    """The layouts of a pipeline's stages, each by the names of its parameters, and a stage's ranks."""

    stages: tuple[Mapping[str, Layout], ...]
    stage_size: int

    @property
    def device_num(self) -> int:
        """All ranks."""
        return len(self.stages) * self.stage_size

    @property
    def names(self) -> set[str]:
        """The parameters of all stages."""
        return {name for stage in self.stages for name in stage}

    def stage_of(self, name: str) -> int | None:
        """The first stage that has the parameter."""
        return next((number for number, stage in enumerate(self.stages) if name in stage), None)

    def ranks_of(self, stage: int) -> range:
        """The ranks of a stage."""
        return range(stage * self.stage_size, (stage + 1) * self.stage_size)


@lru_cache(maxsize=1024)
def _places(layout: Layout) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    matrix = layout.device_matrix
    slices: list[tuple[int, ...]] = []
    sharing: dict[tuple[int, ...], list[int]] = {}
    for rank, coordinates in enumerate(product(*map(range, matrix))):
        place = []
        for axes in layout.axes:
            index = 0
            for axis in axes:
                index = index * matrix[-1 - axis] + coordinates[-1 - axis]
            place.append(index)
        slices.append(tuple(place))
        sharing.setdefault(tuple(place), []).append(rank)
    parts = [prod(matrix[-1 - axis] for axis in axes) for axes in layout.axes]
    if layout.optimizer_parts:
        group = len(sharing[slices[0]]) if layout.optimizer_parts == -1 else layout.optimizer_parts
        parts[0] *= group
        order = {rank: number % group for ranks in sharing.values() for number, rank in enumerate(ranks)}
        slices = [(place[0] * group + order[rank], *place[1:]) for rank, place in enumerate(slices)]
    return tuple(parts), tuple(slices)


def read_strategies(path: str | Path) -> Cluster:
    """The cluster that a strategy file describes, or a folder of ``*.ckpt`` strategy files.

    A folder holds the files of all ranks, or of one rank of each stage; a file, those of a pipeline of one
    stage or of several that MindSpore's ``merge_pipeline_strategys`` put together. UsageError unless they
    describe one cluster.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.ckpt"))
    if not files:
        raise UsageError(
            f"{path} {'holds no *.ckpt' if path.is_dir() else 'does not exist'}; expected files such as "
            "ckpt_strategy_rank_0.ckpt, of output/strategy or of telechat_plan.py --dry_run --output_dir DIR"
        )
    stages: dict[int, dict[str, Layout]] = {}
    read: dict[bytes, Path] = {}
    for file in files:
        content = file.read_bytes()
        if content in read:  # ranks of a stage have the same file
            continue
        read[content] = file
        for stage, layouts in _parse(file, content).items():
            if stages.setdefault(stage, layouts) != layouts:
                raise UsageError(
                    f"{file} and another file beside it describe stage {stage} differently; give the "
                    "strategies of one run alone"
                )
    if sorted(stages) != list(range(len(stages))):
        raise UsageError(
            f"{path} holds strategies of the pipeline stages {sorted(stages)}; expected all from 0 on. Give "
            "the files of all ranks, or of one rank of each stage"
        )
    sizes = {prod(layout.device_matrix) for layouts in stages.values() for layout in layouts.values()}
    if len(sizes) != 1:
        ranks = " and ".join(map(str, sorted(sizes)))
        raise UsageError(f"{path} holds layouts of {ranks} ranks; give the strategies of one run alone")
    return Cluster(tuple(stages[number] for number in range(len(stages))), sizes.pop())


def _parse(file: Path, content: bytes) -> dict[int, dict[str, Layout]]:
    """Stage -> name -> layout of one file."""
    from google.protobuf.message import DecodeError
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    strategy = ParallelStrategyMap()
    try:
        strategy.ParseFromString(content)
        complete = strategy.parallel_strategy_item and strategy.parallel_layout_item
    except DecodeError:
        complete = False
    if not complete:
        raise UsageError(f"{file} is no MindSpore strategy file with layouts; copy it again, or move it away")
    own_stage = strategy.parallel_strategy_item[0].parallel_strategys.stage
    stages: dict[int, dict[str, Layout]] = {}
    for item in strategy.parallel_layout_item:
        stage, dash, name = item.param_name.partition("-")
        if not (dash and stage.isdigit()):  # merged files name the stage before the parameter
            stage, name = own_stage, item.param_name
        stages.setdefault(int(stage), {})[name] = _layout(file, name, item.parallel_layouts)
    return stages


def _layout(file: Path, name: str, stored: Any) -> Layout:
    if any(entry.dim for entry in stored.param_split_shape) or stored.field:
        raise UsageError(f"{file} splits {name} unequally; only equal parts can be transformed")
    maps = [tuple(entry.dim) for entry in stored.tensor_map]
    # One map with an entry per axis, or, where an axis is split by several of the matrix, a map per axis.
    axes = maps if len(maps) > 1 else [(entry,) for entry in (maps[0] if maps else ())]
    return Layout(tuple(stored.dev_matrix[0].dim), _splitting(axes), stored.opt_weight_shard_size)


def _splitting(axes: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(axis for axis in split if axis != -1) for split in axes)


def own_slices(
    whole: Mapping[str, StoredTensor],
    layouts: Mapping[str, Sequence[Any]],
    rank: int,
    place_in_group: GroupPlace,
) -> dict[str, StoredTensor]:
    """What ``rank`` stores of a whole model: views, of which only the own bytes are read later.

    Args:
        whole: all weights by name.
        layouts: MindSpore's ``parameter_layout_dict`` of the compiled cell, with all parameters that the
            rank's stage of the pipeline has: (device matrix, tensor map, …, optimizer group, whole shape).
        rank: in the whole cluster.

    Raises:
        UsageError: a layout is of a parameter of another shape than the weight.
    """
    slices = {}
    for name in (name for name in layouts if name in whole):
        tensor = whole[name]
        device_matrix, tensor_map, *_, group, full_shape = layouts[name][:7]
        if full_shape and tuple(full_shape) != tensor.shape:
            raise UsageError(
                f"{name} is {list(tensor.shape)}, but the compiled model has it as {list(full_shape)}; use "
                "the YAML of this checkpoint's size"
            )
        if tensor_map:
            axes = (entry if isinstance(entry, tuple | list) else (entry,) for entry in tensor_map)
            layout = Layout(tuple(device_matrix), _splitting(axes), optimizer_parts=0)
            place = layout.places()[rank % prod(device_matrix)]  # a stage's ranks are neighbours
            for axis, (index, count) in enumerate(zip(place, layout.parts, strict=True)):
                tensor = part_of(tensor, axis, index, count)
            if group:  # ranks that would store the same share it out along the first axis
                tensor = part_of(tensor, 0, *place_in_group(group))
        slices[name] = tensor
    return slices
