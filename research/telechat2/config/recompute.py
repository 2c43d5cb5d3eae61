"""Which activations are computed again in the backward pass instead of being kept.

``recompute_config`` is MindFormers' section. Its three choices, ``recompute`` (whole layers),
``select_recompute`` (operators of layers) and ``select_comm_recompute`` (communication after operators), each
say for how many layers they hold: all or none (True, False), the first n of each stage (a list), or the first
n of each stage and chunk (a list of lists).
"""

from typing import NamedTuple, TypeGuard

from research.telechat2.common.errors import UsageError
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.pipeline import partition_of

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
    if _is_row(setting, stages):
        dealt = [
            _deal(name, number, [row[stage] for row in counts], stage) for stage, number in enumerate(setting)
        ]
        return [list(row) for row in zip(*dealt, strict=True)]
    if (
        isinstance(setting, list | tuple)
        and len(setting) == chunks
        and all(_is_row(row, stages) for row in setting)
    ):
        return [
            [_deal(name, row[stage], [have[stage]], stage)[0] for stage in range(stages)]
            for row, have in zip(setting, counts, strict=True)
        ]
    raise UsageError(
        f"recompute_config.{name} is {setting!r}; it must be True, False, a list of {stages} numbers of "
        f"layers (one for each stage), or {chunks} such lists (one for each chunk)."
    )


def _is_row(value: object, stages: int) -> TypeGuard[list[int]]:
    return isinstance(value, list | tuple) and len(value) == stages and all(isinstance(n, int) for n in value)


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
    """What a TelechatConfig asks for.

    Raises:
        UsageError: see first_layers.
    """
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
