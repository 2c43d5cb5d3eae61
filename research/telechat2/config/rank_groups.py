"""Which groups of ranks can communicate on Ascend's nodes; a rule of MindSpore, which needs no MindSpore.

MindSpore lays ranks out as (stage, data-parallel, context-parallel, tensor-parallel), the last fastest, eight
to a node; context-parallel ranks as (those that gather, those that exchange heads). It makes a group only if
its ranks have the same places on every node that they touch, and these places are one of a node, all eight,
one half (0-3 or 4-7), two of a half, or two or four in pairs that are four apart.
"""

from collections.abc import Iterator

from research.telechat2.common.errors import UsageError
from research.telechat2.common.tables import listed

_NODE = 8


def check_groups(dp: int, mp: int, stages: int, gather: int = 1, exchange: int = 1) -> None:
    """UsageError for a plan whose groups MindSpore would refuse to make, with the group and its ranks.

    ``gather``, ``exchange``: the factors of context parallel, see exchange_of.
    """
    for name, ranks in _groups(dp, mp, stages, gather, exchange):
        if not _is_possible(ranks):
            raise UsageError(
                f"{name} would communicate between the ranks {listed(ranks, 8)}, a group that MindSpore does "
                f"not make on nodes of {_NODE} NPUs; choose powers of two, or other devices for each stage."
            )


def _groups(dp: int, mp: int, stages: int, gather: int, exchange: int) -> Iterator[tuple[str, range]]:
    cp = gather * exchange
    each = dp * cp * mp
    # name, ranks, how far they are apart
    kinds = [
        (f"model_parallel {mp}", mp, 1),
        (f"data_parallel {dp}", dp, cp * mp),
        (f"a stage of {_factors(dp, cp, mp)}", each, 1),
    ]
    if cp > 1:
        kinds += [
            (f"context_parallel {cp}", cp, mp),
            (f"context_parallel {cp}, of which {gather} gather", gather, exchange * mp),
            (f"context_parallel {cp}, of which {exchange} exchange heads", exchange, mp),
            (f"data_parallel {dp} times context_parallel {cp}", dp * cp, mp),
        ]
    for name, size, apart in kinds:
        for block in range(0, stages * each, size * apart):
            for first in range(block, block + apart):
                yield name, range(first, first + size * apart, apart)
    for first in range(each):  # MindSpore sends and receives in one group of all stages
        yield f"pipeline_stage {stages} of {each} devices each", range(first, stages * each, each)


def _factors(dp: int, cp: int, mp: int) -> str:
    named = (("data_parallel", dp), ("context_parallel", cp), ("model_parallel", mp))
    return " times ".join(f"{name} {size}" for name, size in named if size > 1 or name != "context_parallel")


def _is_possible(ranks: range) -> bool:
    places: dict[int, list[int]] = {}
    for rank in ranks:
        places.setdefault(rank // _NODE, []).append(rank % _NODE)
    first, *others = places.values()
    half = _NODE // 2
    in_one_half = len({place // half for place in first}) == 1
    opposite = {(place + half) % _NODE for place in first} == set(first)
    fits = len(first) in (1, 8) or (len(first) in (2, 4) and (in_one_half or opposite))
    return fits and all(other == first for other in others)
