"""Mark the activations that the backward pass computes again."""

import re

from mindspore.ops import Primitive

from research.telechat2.common.errors import UsageError
from research.telechat2.config.pipeline import Place, partition_of, places
from research.telechat2.config.recompute import read_recompute


def recompute_layers(model, config) -> None:
    """Mark what a TelechatForCausalLM computes again; on every target, with one device as with many.

    A layer that is computed again as a whole is not searched for operators.

    Raises:
        UsageError: a pattern matches no operator of a layer.
    """
    section = config.parallel_config.recompute
    tables = read_recompute(config)
    for layer, place in zip(model.model.layers, places(partition_of(config)), strict=True):
        if _holds(tables.whole, place):
            layer.recompute(
                mp_comm_recompute=section.mp_comm_recompute,
                recompute_slice_activation=section.recompute_slice_activation,
            )
            continue
        for pattern, table in tables.selected.items():
            if _holds(table, place):
                for operator in _matching("select_recompute", pattern, layer):
                    operator.recompute()
        for pattern, table in tables.communication.items():
            if _holds(table, place):
                for operator in _matching("select_comm_recompute", pattern, layer):
                    operator.add_prim_attr("recompute_comm_op", True)


def _holds(table: list[list[int]], place: Place) -> bool:
    return place.number < table[place.chunk][place.stage]


def _matching(name: str, pattern: str, layer) -> list:
    """The operators of a layer whose path, such as ``feed_forward.swiglu.swiglu``, is matched as a whole."""
    operators = {
        f"{path}.{attribute}".lstrip("."): operator
        for path, cell in layer.cells_and_names()
        for attribute, operator in vars(cell).items()
        if isinstance(operator, Primitive)
    }
    found = [operator for path, operator in operators.items() if re.fullmatch(pattern, path)]
    if not found:
        raise UsageError(
            f"recompute_config.{name} names {pattern!r}, which matches no operator of a layer; there are "
            f"{', '.join(sorted(operators))}."
        )
    return found
