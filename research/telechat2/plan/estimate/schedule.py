"""When each stage of a pipeline computes what: 1F1B, and 1F1B with virtual chunks.

The order of a stage's passes is that of Narayanan et al. 2021 (Efficient Large-Scale Language Model Training
on GPU Clusters Using Megatron-LM, section 2.2). Stages may take different times; the bubble is idle time.
"""

from dataclasses import dataclass
from typing import NamedTuple

from research.telechat2.common.errors import UsageError


class Pass(NamedTuple):
    """A forward or backward pass of one chunk of one stage with one micro-batch; times in seconds."""

    stage: int
    forward: bool
    chunk: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """All passes of a step in the order of their ends, their time and their memory.

    Attributes:
        passes: see Pass.
        seconds: from the first pass to the last.
        bubble: share of all stages' time in which they are idle.
        in_flight: most micro-batches whose activations a stage keeps at once, ``[chunk][stage]``, taken at
            the moment at which the stage keeps most of all chunks together.
    """

    passes: tuple[Pass, ...]
    seconds: float
    bubble: float
    in_flight: tuple[tuple[int, ...], ...]


MOST_PASSES = 1_000_000  # forward, of all stages, chunks and micro-batches; some seconds


def schedule(forward: list[list[float]], backward: list[list[float]], micro_batches: int) -> Schedule:
    """Run a step of passes that take ``[chunk][stage]`` seconds.

    Raises:
        UsageError: virtual chunks, and the micro-batches are no multiple of the stages; or too many passes.
    """
    chunks, stages = len(forward), len(forward[0])
    if chunks * stages * micro_batches > MOST_PASSES:
        raise UsageError(
            f"parallel_config.micro_batch_num is {micro_batches:,}; with {stages} stages and {chunks} chunks "
            f"at most {MOST_PASSES // stages // chunks:,} are estimated. Lower it."
        )
    multiple = -(-micro_batches // stages) * stages
    if chunks > 1 and micro_batches != multiple:
        raise UsageError(
            f"parallel_config.micro_batch_num is {micro_batches}; with pp_interleave_num {chunks} it must be "
            f"a multiple of pipeline_stage {stages}. Set micro_batch_num to {multiple}."
        )
    orders = [_order(stage, stages, chunks, micro_batches) for stage in range(stages)]
    last = chunks * stages - 1  # chunk after chunk, the stages are a chain of places
    ends: dict[tuple[bool, int, int], float] = {(True, -1, number): 0.0 for number in range(micro_batches)}
    free, taken = [0.0] * stages, [0] * stages
    passes: list[Pass] = []
    while len(passes) < 2 * chunks * stages * micro_batches:
        before = len(passes)
        for stage, order in enumerate(orders):
            while taken[stage] < len(order):
                way, chunk, micro_batch = order[taken[stage]]
                place = chunk * stages + stage
                source = place - 1 if way else place + 1
                needed = (way, source) if source <= last else (True, last)
                ready = ends.get((*needed, micro_batch))
                if ready is None:
                    break
                start = max(free[stage], ready)
                end = start + (forward if way else backward)[chunk][stage]
                ends[way, place, micro_batch] = free[stage] = end
                taken[stage] += 1
                passes.append(Pass(stage, way, chunk, micro_batch, start, end))
        assert len(passes) > before, "a stage waits for itself"
    seconds = max(free)
    busy = sum(p.end - p.start for p in passes)
    bubble = 1 - busy / (seconds * stages) if seconds else 0.0
    return Schedule(tuple(passes), seconds, bubble, _in_flight(passes, chunks, stages))


def _order(stage: int, stages: int, chunks: int, micro_batches: int) -> list[tuple[bool, int, int]]:
    """Direction, chunk and micro-batch of a stage's passes.

    First forward passes alone, then forward and backward passes in turn, then what is left.
    """
    forward = [(True, *rest) for rest in _sequence(range(chunks), stages, micro_batches)]
    backward = [(False, *rest) for rest in _sequence(range(chunks - 1, -1, -1), stages, micro_batches)]
    alone = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    alone = min(alone, len(forward) - 1)
    turns = zip(forward[alone:], backward[: len(backward) - alone], strict=True)
    return forward[:alone] + [step for turn in turns for step in turn] + backward[len(backward) - alone :]


def _sequence(chunks: range, stages: int, micro_batches: int) -> list[tuple[int, int]]:
    """Chunk and micro-batch: as many micro-batches as there are stages, for each chunk in turn."""
    return [
        (chunk, micro_batch)
        for first in range(0, micro_batches, stages)
        for chunk in chunks
        for micro_batch in range(first, min(first + stages, micro_batches))
    ]


def _in_flight(passes: list[Pass], chunks: int, stages: int) -> tuple[tuple[int, ...], ...]:
    most = [[0] * chunks for _ in range(stages)]
    kept = [[0] * chunks for _ in range(stages)]
    for step in passes:  # the passes of a stage are in its own order
        kept[step.stage][step.chunk] += 1 if step.forward else -1
        if sum(kept[step.stage]) > sum(most[step.stage]):
            most[step.stage] = list(kept[step.stage])
    return tuple(zip(*most, strict=True))
