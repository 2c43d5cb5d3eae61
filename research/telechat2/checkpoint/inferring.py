"""Sizes that show in the tensors alone: names and shapes, without a config."""

import re
from collections.abc import Iterable, Mapping
from math import prod
from statistics import mode

from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.table import (
    ATTENTION_ROWS,
    DENSE_ROWS,
    LM_HEAD,
    MOE_ROWS,
    ROWS,
    Side,
    place,
)

Shapes = Mapping[str, tuple[int, ...]]  # by canonical name


def infer_sizes(shapes: Shapes, side: Side) -> TelechatSizes:
    """Sizes by the first tensor of each row that is there.

    Raises:
        ValueError: a size shows in no tensor, so this is no TeleChat checkpoint; or as ``count_experts``.
    """
    layers = _layer_indices(shapes, side)
    expert = min(_expert_indices(shapes, side), default=0)
    dims: dict[str, int] = {}
    for row in ROWS:
        name = getattr(row, side).format(i=min(layers, default=0), e=expert)
        symbols, shape = row.shape_on(side), shapes.get(name, ())
        if len(shape) == len(symbols):
            for symbol, size in zip(symbols, shape, strict=True):
                if size:
                    dims.setdefault(symbol, size)
    absent = [symbol for symbol in ("vocab", "hidden", "ffn", "key_value") if symbol not in dims]
    if absent or not layers:
        raise ValueError(
            f"this is no TeleChat checkpoint: none of its {len(shapes)} tensors shows the size of "
            f"{', '.join(absent) or 'a layer'}. Its first names are {sorted(shapes)[:5]}, expected names "
            f"such as {getattr(ATTENTION_ROWS[2], side).format(i=0)}"
        )
    return TelechatSizes(
        # A layer number beyond the number of tensors is a broken name: do not build a table of that length.
        num_layers=min(max(layers) + 1, len(shapes)),
        hidden_size=dims["hidden"],
        intermediate_size=dims["ffn"],
        vocab_size=dims["vocab"],
        kv_size=dims["key_value"] // 2,
        tie_word_embeddings=getattr(LM_HEAD, side) not in shapes,
        num_experts=count_experts(shapes, side) or 0,
    )


def count_experts(shapes: Shapes, side: Side) -> int | None:
    """The number of experts of every layer, 0 in a dense model; None where nothing shows which it is.

    It is the leading axis of the routers and stacks (what most of them say), or else the number of different
    expert numbers.

    Raises:
        ValueError: some layers are dense and some have experts, or there are more experts than tensors.
    """
    dense, moe = (_first_of(shapes, rows, side) for rows in (DENSE_ROWS, MOE_ROWS))
    if dense and moe:
        raise ValueError(
            f"some of these tensors are of a dense model ({dense}) and some of a mixture of experts ({moe}); "
            "every layer of a TeleChat model is of the same kind. Give the files of one checkpoint"
        )
    if not moe:
        return 0 if dense else None
    counts = [
        shape[row.shape_on(side).index("experts")]
        for row in MOE_ROWS
        if "experts" in row.shape_on(side)
        for name, shape in shapes.items()
        if place(name, row, side) and len(shape) == len(row.shape_on(side)) and prod(shape)
    ]
    count = mode(counts) if counts else len(_expert_indices(shapes, side))
    if side == "torch" and count > len(shapes):  # do not build a table of that length
        raise ValueError(
            f"the routers have rows for {count} experts, but there are only {len(shapes)} tensors; every "
            "expert has four in each layer. Files are missing, or the checkpoint is broken"
        )
    return count


def _first_of(shapes: Shapes, rows, side: Side) -> str | None:
    return next((name for name in shapes if any(place(name, row, side) for row in rows)), None)


def _layer_indices(names: Iterable[str], side: Side) -> set[int]:
    prefix = getattr(ATTENTION_ROWS[0], side).partition("{i}")[0]
    matches = (re.match(re.escape(prefix) + r"([0-9]{1,9})\.", name) for name in names)
    return {int(match[1]) for match in matches if match}


def _expert_indices(names: Iterable[str], side: Side) -> set[int]:
    rows = [row for row in MOE_ROWS if "{e}" in getattr(row, side)]
    places = (place(name, row, side) for name in names for row in rows)
    return {found[1] for found in places if found}
