"""Which stage of the pipeline holds which layers.

A stage holds one run of consecutive layers, or with virtual chunks (``pp_interleave_num``) several: the
activations pass through all stages once for each chunk. Tables here are ``[chunk][stage]``.
"""

from typing import Any, NamedTuple, TypeGuard

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
            f"model_config.offset is {offset}, which adds {total} layers, but {num_layers} layers on "
            f"{stages} stages of {chunks} chunks are {base} each and {remainder} more; offset must add up to "
            f"{remainder}: {_example(remainder, stages, chunks)} for one."
        )
    counts = [[base + value for value in row] for row in offsets]
    flat = sum(counts, [])
    if any(count < 0 for count in flat) or any(count < 1 for count in flat[1:-1]):
        raise UsageError(
            f"model_config.offset is {offset}, which gives the stages {_written(counts)} of the {num_layers} "
            "layers; all but the first and the last need at least one."
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
    """Refuse what ``parallel.pipeline_config`` says and this model cannot do.

    Raises:
        UsageError: another schedule, or chunks and interleaving that do not fit.
    """
    if scheduler not in ("1f1b", "gpipe"):
        raise UsageError(
            f"parallel.pipeline_config.pipeline_scheduler is {scheduler}, but this model has 1f1b, and gpipe "
            "for chunks; set it to 1f1b."
        )
    if (chunks > 1) != interleaved:
        raise UsageError(
            f"model_config.pp_interleave_num is {chunks}, but parallel.pipeline_config.pipeline_interleave "
            f"is {interleaved}; it must be {chunks > 1}."
        )
    if scheduler == "gpipe" and chunks == 1:
        raise UsageError(
            "parallel.pipeline_config.pipeline_scheduler is gpipe, which MindSpore has for chunks only, and "
            "model_config.pp_interleave_num is 1; set the scheduler to 1f1b."
        )


def _table(offset: Offset, stages: int, chunks: int) -> list[list[int]]:
    if is_whole(offset):
        return [[offset] * stages] * chunks
    if _is_row(offset, stages):
        return [list(offset)] * chunks
    if (
        isinstance(offset, list | tuple)
        and len(offset) == chunks
        and all(_is_row(row, stages) for row in offset)
    ):
        return [list(row) for row in offset]
    raise UsageError(
        f"model_config.offset is {offset!r}; it must be a whole number, a list of {stages} (pipeline_stage), "
        f"or {chunks} (pp_interleave_num) lists of {stages}."
    )


def _is_row(value: object, stages: int) -> TypeGuard[list[int]]:
    return isinstance(value, list | tuple) and len(value) == stages and all(map(is_whole, value))


def _example(remainder: int, stages: int, chunks: int) -> str:
    """A legal offset that spares the first and the last stage, where there is more to do than layers."""
    flat = [0] * (stages * chunks)
    order = [*range(1, len(flat) - 1), len(flat) - 1]
    for index in order[:remainder]:
        flat[index] = 1
    return _written([flat[i * stages : (i + 1) * stages] for i in range(chunks)])


def _written(table: list[list[int]]) -> str:
    return str(table[0] if len(table) == 1 else table)
