"""Which activations are computed again in the backward pass instead of being kept: ``recompute_config``.

Its three choices, ``recompute`` (whole layers), ``select_recompute`` (operators of layers) and
``select_comm_recompute`` (communication after operators), each say for how many layers they hold.
"""

from typing import NamedTuple

from research.telechat2.common.errors import UsageError
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.pipeline import partition_of, rows_of

# What is large and cheap: the product of the feed-forward block, and what the gate's activation kept for it.
SELECTED = r"feed_forward\.swiglu\..*"
# The all-gathers of sequence parallelism follow the norms.
COMMUNICATION = r".*_norm\..*"


def first_layers(name: str, setting: object, counts: list[list[int]]) -> list[list[int]]:
    """How many layers of each chunk and stage a setting holds for.

    Args:
        name: of the setting, for errors.
        setting: True, False, a list with a number or bool for each stage, or a list of such lists, one for
            each chunk. A stage's number is dealt to its chunks one by one.
        counts: the layers of each chunk and stage.

    Raises:
        UsageError: another type or shape, or more layers than there are.
    """
    chunks, stages = len(counts), len(counts[0])
    if isinstance(setting, bool):
        return [[count * setting for count in row] for row in counts]
    rows = rows_of(setting, stages, chunks, lambda number: isinstance(number, int))
    if rows is None:
        raise UsageError(
            f"recompute_config.{name} is {setting!r}; it must be True, False, a list of {stages} numbers of "
            f"layers (one for each stage), or {chunks} such lists (one for each chunk)."
        )
    if len(rows) == chunks:
        return [
            [
                _deal(name, number, [count], stage)[0]
                for stage, (number, count) in enumerate(zip(*both, strict=True))
            ]
            for both in zip(rows, counts, strict=True)
        ]
    columns = enumerate(zip(rows[0], zip(*counts, strict=True), strict=True))
    dealt = [_deal(name, number, list(have), stage) for stage, (number, have) in columns]
    return [list(row) for row in zip(*dealt, strict=True)]


def _deal(name: str, number: int, have: list[int], stage: int) -> list[int]:
    """Share ``number`` layers of a stage out to its chunks, which have as many as ``have`` says."""
    if isinstance(number, bool):
        return [count * number for count in have]
    if not 0 <= number <= sum(have):
        raise UsageError(
            f"recompute_config.{name} asks for {number} layers of stage {stage}, which has {sum(have)}."
        )
    dealt = [0] * len(have)
    while sum(dealt) < number:
        for chunk, count in enumerate(have):
            if dealt[chunk] < count and sum(dealt) < number:
                dealt[chunk] += 1
    return dealt


class Recompute(NamedTuple):
    """How many layers of each chunk and stage are computed again: whole, or the operators of patterns."""

    whole: list[list[int]]
    selected: dict[str, list[list[int]]]
    communication: dict[str, list[list[int]]]


def read_recompute(config: ModelSettings) -> Recompute:
    """What a TelechatConfig asks for; UsageError as in first_layers."""
    section, counts = config.parallel_config.recompute, partition_of(config)
    return Recompute(
        first_layers("recompute", section.recompute, counts),
        _by_pattern("select_recompute", section.select_recompute, SELECTED, counts),
        _by_pattern("select_comm_recompute", section.select_comm_recompute, COMMUNICATION, counts),
    )


def _by_pattern(
    name: str, setting: object, default: str, counts: list[list[int]]
) -> dict[str, list[list[int]]]:
    """Layers for each pattern; a setting may name patterns itself, as a list of them or as keys."""
    if isinstance(setting, dict):
        return {pattern: first_layers(name, value, counts) for pattern, value in setting.items()}
    if isinstance(setting, list | tuple) and setting and all(isinstance(value, str) for value in setting):
        return {pattern: first_layers(name, True, counts) for pattern in setting}
    return {default: first_layers(name, setting, counts)}
