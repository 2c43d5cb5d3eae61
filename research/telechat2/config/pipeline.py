"""Which stage of the pipeline holds which layers.

A stage holds one run of consecutive layers, or with virtual chunks (``pp_interleave_num``) several: the
activations pass through all stages once for each chunk. Tables here are ``[chunk][stage]``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from research.telechat2.common.errors import UsageError
from research.telechat2.config.kinds import is_whole
from research.telechat2.config.model_settings import ModelSettings

Offset = int | list[Any]  # of all stages; of each; or for each chunk of each


class Place(NamedTuple):
    """Where a layer is: its chunk and stage, and its number among the layers there."""

    chunk: int
    stage: int
    number: int


def partition(num_layers: int, stages: int, chunks: int, offset: Offset) -> list[list[int]]:
    """Number of layers of each stage and chunk, ``num_layers // (stages * chunks) + offset``.

    Args:
        offset: one number for all, a list with one for each stage, or for each chunk a list of that kind. All
            of them must add up to ``num_layers % (stages * chunks)``.

    Raises:
        UsageError: ``offset`` has another shape or sum, or leaves a chunk without layers. The first and the
            last chunk may have none: they have the embedding and the output projection.
    """
    base, remainder = divmod(num_layers, stages * chunks)
    offsets = _table(offset, stages, chunks)
    total = sum(map(sum, offsets))
    if total != remainder:
        raise UsageError(
            f"model_config.offset is {offset}, which adds {total} layers; {num_layers} layers on {stages} "
            f"stages of {chunks} chunks are {base} each and {remainder} more, such as "
            f"{_example(remainder, stages, chunks)}."
        )
    counts = [[base + value for value in row] for row in offsets]
    flat = sum(counts, [])
    if any(count < 0 for count in flat) or any(count < 1 for count in flat[1:-1]):
        raise UsageError(
            f"model_config.offset {offset} gives the stages {_written(counts)} of {num_layers} layers; all "
            "but the first and the last need at least one."
        )
    return counts


def places(counts: list[list[int]]) -> list[Place]:
    """The place of every layer, in the order of layers; ``counts`` is a partition."""
    return [
        Place(chunk, stage, number)
        for chunk, row in enumerate(counts)
        for stage, count in enumerate(row)
        for number in range(count)
    ]


def partition_of(config: ModelSettings) -> list[list[int]]:
    """The partition that a TelechatConfig asks for."""
    stages = config.parallel_config.pipeline_stage
    return partition(config.num_layers, stages, config.pp_interleave_num, config.offset)


def check_schedule(chunks: int, scheduler: str, interleaved: bool) -> None:
    """UsageError for a schedule of ``parallel.pipeline_config`` that this model or its chunks cannot have."""
    name = "parallel.pipeline_config"
    if scheduler not in ("1f1b", "gpipe") or (scheduler == "gpipe" and chunks == 1):
        raise UsageError(
            f"{name}.pipeline_scheduler is {scheduler} and model_config.pp_interleave_num {chunks}; set the "
            "scheduler to 1f1b (gpipe is for chunks only)."
        )
    if (chunks > 1) != interleaved:
        raise UsageError(
            f"model_config.pp_interleave_num is {chunks} and {name}.pipeline_interleave {interleaved}; set "
            f"the latter to {chunks > 1}."
        )


def _table(offset: Offset, stages: int, chunks: int) -> list[list[int]]:
    if is_whole(offset):
        return [[offset] * stages] * chunks
    if rows := rows_of(offset, stages, chunks, is_whole):
        return rows if len(rows) == chunks else rows * chunks
    raise UsageError(
        f"model_config.offset is {offset!r}; it must be a whole number, a list of {stages} (pipeline_stage), "
        f"or {chunks} (pp_interleave_num) lists of {stages}."
    )


def rows_of(value: Any, stages: int, chunks: int, fits: Callable[[object], bool]) -> list[list[Any]] | None:
    """A list with an item for each stage as one row, ``chunks`` such lists as rows; None for all else."""

    def is_row(row: object) -> bool:
        return isinstance(row, list | tuple) and len(row) == stages and all(map(fits, row))

    if is_row(value):
        return [list(value)]
    is_table = isinstance(value, list | tuple) and len(value) == chunks and all(map(is_row, value))
    return [list(row) for row in value] if is_table else None


def _example(remainder: int, stages: int, chunks: int) -> str:
    """A legal offset that spares the first and the last stage, where there is more to do than layers."""
    flat = [0] * (stages * chunks)
    order = [*range(1, len(flat) - 1), len(flat) - 1]
    for index in order[:remainder]:
        flat[index] = 1
    return _written([flat[i * stages : (i + 1) * stages] for i in range(chunks)])


def _written(table: list[list[int]]) -> str:
    return str(table[0] if len(table) == 1 else table)
