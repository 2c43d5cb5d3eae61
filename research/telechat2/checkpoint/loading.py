"""Weights into a model that is built: names and shapes first, then one tensor in memory at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.telechat2.checkpoint.cluster.strategies import GroupPlace, own_slices
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError
from research.telechat2.common.tables import listed

NO_WEIGHTS = ("_cache", "expert_load")  # parameters that a model fills itself


def load_tensors(model: Any, tensors: Mapping[str, StoredTensor], origin: str) -> None:
    """Fill every parameter of ``model`` but its caches, each in the dtype that it has.

    Args:
        model: a MindSpore cell, whose parameters need no data yet.
        tensors: by the names of the parameters.
        origin: what messages call the checkpoint.

    Raises:
        UsageError: names or shapes are not the model's (nothing is loaded then), or a value is beyond the
            range of the parameter's dtype.
    """
    parameters = _weights_of(model)
    _compare_names(parameters, tensors, origin)
    _compare_shapes(parameters, tensors, origin)
    for name, tensor in tensors.items():
        parameters[name].set_data(_as_tensor(tensor, parameters[name].dtype))
    model.init_parameters_data()


def load_slices(
    network: Any,
    whole: Mapping[str, StoredTensor],
    layouts: Mapping[str, Sequence[Any]],
    rank: int,
    place_in_group: GroupPlace,
    origin: str,
) -> None:
    """Fill what this rank stores of a compiled network; for the arguments see ``own_slices``.

    Other stages' parameters and those that are no weights stay. UsageError as in ``load_tensors``; every name
    is compared, also those of other stages.
    """
    parameters = _weights_of(network)
    _compare_names(parameters, whole, origin)
    slices = own_slices(whole, layouts, rank, place_in_group)
    _compare_shapes(parameters, slices, origin)
    for name, tensor in slices.items():
        parameters[name].set_data(_as_tensor(tensor, parameters[name].dtype), slice_shape=True)


def _weights_of(network: Any) -> dict[str, Any]:
    parameters = network.get_parameters()
    return {parameter.name: parameter for parameter in parameters if not parameter.name.endswith(NO_WEIGHTS)}


def _as_tensor(tensor: StoredTensor, dtype: object) -> Any:
    from mindspore import Tensor
    from mindspore.common.np_dtype import bfloat16

    target = str(dtype).lower()
    assert target in WIDTH
    content = np.frombuffer(tensor.read(target), bfloat16 if target == "bfloat16" else target)
    return Tensor(content.reshape(tensor.shape))


def _compare_shapes(parameters: Mapping[str, Any], tensors: Mapping[str, StoredTensor], origin: str) -> None:
    different = [
        f"{name} is {list(tensor.shape)}, expected {list(parameters[name].shape)}"
        for name, tensor in tensors.items()
        if tuple(parameters[name].shape) != tensor.shape
    ]
    _refuse(different, origin)


def _compare_names(parameters: Mapping[str, Any], tensors: Mapping[str, StoredTensor], origin: str) -> None:
    different = [f"{name} is not in the model" for name in tensors if name not in parameters]
    different += [f"{name} is missing" for name in parameters if name not in tensors]
    _refuse(different, origin)


def _refuse(different: list[str], origin: str) -> None:
    if different:
        raise UsageError(
            f"{origin} does not fit the model of the YAML, {len(different)} tensors: {listed(different)}. "
            "Use the YAML of its size and kind, dense or mixture of experts"
        )
