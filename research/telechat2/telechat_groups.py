"""Which ranks of a plan communicate, and whether Ascend's nodes have such groups; needs no MindSpore.

MindSpore lays ranks out as (stage, data-parallel, tensor-parallel), the last fastest, eight to a node. It
makes a group only if its ranks have the same places on every node that they touch, and these places are one
of a node, all eight, one half (0-3 or 4-7), two of a half, or two or four in pairs that are four apart.
"""

from collections.abc import Iterator

_NODE = 8


def check_groups(dp: int, mp: int, stages: int) -> None:
    """Refuse a plan whose groups MindSpore would refuse to make.

    Raises:
        ValueError: names the group and its ranks.
    """
    for name, ranks in _groups(dp, mp, stages):
        if not _is_possible(ranks):
            raise ValueError(
                f"{name} would communicate between the ranks {_listed(ranks)}, but MindSpore makes no such "
                f"group on nodes of {_NODE} NPUs: its ranks must have the same places on every node, one, "
                "two, four or eight of them. Choose powers of two, or other devices for each stage."
            )


def _groups(dp: int, mp: int, stages: int) -> Iterator[tuple[str, range]]:
    each = dp * mp
    for first in range(0, stages * each, each):
        for start in range(first, first + each, mp):
            yield f"model_parallel {mp}", range(start, start + mp)
        for start in range(first, first + mp):
            yield f"data_parallel {dp}", range(start, start + each, mp)
        yield f"a stage of data_parallel {dp} times model_parallel {mp}", range(first, first + each)
    for first in range(each):  # MindSpore sends and receives in one group of all stages
        yield f"pipeline_stage {stages} of {each} devices each", range(first, stages * each, each)


def _is_possible(ranks: range) -> bool:
    places: dict[int, list[int]] = {}
    for rank in ranks:
        places.setdefault(rank // _NODE, []).append(rank % _NODE)
    first, *others = places.values()
    return all(other == first for other in others) and _is_possible_on_a_node(first)


def _is_possible_on_a_node(places: list[int]) -> bool:
    if len(places) in (1, 8):
        return True
    half = _NODE // 2
    in_one_half = len({place // half for place in places}) == 1
    opposite = {place + half if place < half else place - half for place in places} == set(places)
    return len(places) in (2, 4) and (in_one_half or opposite)


def _listed(ranks: range) -> str:
    shown = [str(rank) for rank in ranks[:8]]
    return ", ".join(shown) + (f", … {ranks[-1]}" if len(ranks) > 8 else "")
