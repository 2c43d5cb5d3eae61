"""The rule about groups on Ascend's nodes, on plans that MindSpore was seen to compile or to refuse."""

import pytest

from research.telechat2.telechat_groups import check_groups


@pytest.mark.parametrize(
    ("dp", "mp", "stages"),
    # powers of two, whatever the order; the published clusters; nodes' halves as stages
    [
        (8, 1, 1),
        (1, 4, 4),
        (8, 8, 8),
        (128, 4, 2),
        (2, 2, 2),
        (2, 4, 3),
        (1, 2, 4),
        (3, 8, 1),
        (1, 8, 8),
        (6, 4, 1),
    ],
)
def test_groups_that_nodes_have_are_allowed(dp, mp, stages):
    check_groups(dp, mp, stages)


@pytest.mark.parametrize(
    ("dp", "mp", "stages", "group"),
    [
        (8, 3, 1, "model_parallel 3 would communicate between the ranks 0, 1, 2, "),
        (3, 4, 2, "data_parallel 3 would communicate between the ranks 0, 4, 8, "),
        (6, 2, 2, "data_parallel 6 would communicate between the ranks 0, 2, 4, 6, 8, 10, "),
    ],
)
def test_others_are_refused_by_name(dp, mp, stages, group):
    with pytest.raises(ValueError, match=group):
        check_groups(dp, mp, stages)
