"""The slice of a weight that a rank of a training cluster stores, by the layouts that MindSpore compiled."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from research.telechat2.checkpoint.cluster.strategies import Layout
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.checkpoint.storage.views import part_of
from research.telechat2.common.errors import UsageError

# Of a communication group: this rank's number in it, and its size.
GroupPlace = Callable[[str], tuple[int, int]]


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
    return {
        name: _slice(whole[name], layout, rank, place_in_group)
        for name, layout in layouts.items()
        if name in whole
    }


def _slice(
    tensor: StoredTensor, layout: Sequence[Any], rank: int, place_in_group: GroupPlace
) -> StoredTensor:
    device_matrix, tensor_map, *_, group, full_shape = layout[:7]
    if full_shape and tuple(full_shape) != tensor.shape:
        raise UsageError(
            f"{tensor.name} is {list(tensor.shape)}, but the compiled model has it as {list(full_shape)}; "
            "use the YAML of this checkpoint's size"
        )
    if not tensor_map:
        return tensor
    axes = tuple(
        tuple(axis for axis in (entry if isinstance(entry, tuple | list) else (entry,)) if axis != -1)
        for entry in tensor_map
    )
    parts = Layout(tuple(device_matrix), axes, optimizer_parts=0)
    place = parts.places()[rank % prod(device_matrix)]  # a stage's ranks are neighbours
    for axis, (index, count) in enumerate(zip(place, parts.parts, strict=True)):
        tensor = part_of(tensor, axis, index, count)
    if group:  # ranks that would store the same share it out along the first axis
        tensor = part_of(tensor, 0, *place_in_group(group))
    return tensor
