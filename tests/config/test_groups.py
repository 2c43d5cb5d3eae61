"""The rule about groups on Ascend's nodes, on plans that MindSpore was seen to compile or to refuse."""

from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.config.rank_groups import check_groups


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
        (8, 3, 1, ("model_parallel 3", 0, 1, 2)),
        (3, 4, 2, ("data_parallel 3", 0, 4, 8)),
        (6, 2, 2, ("data_parallel 6", 0, 2, 4, 6, 8, 10)),
    ],
)
def test_others_are_refused_by_name(dp, mp, stages, group):
    with refused(*group):
        check_groups(dp, mp, stages)


@pytest.mark.parametrize(
    ("dp", "gather", "exchange", "mp", "stages"),
    # each of them compiled by MindSpore for 24, 8 or 16 devices
    [
        (3, 2, 1, 4, 1), (1, 3, 1, 8, 1), (1, 1, 3, 8, 1), (3, 1, 8, 1, 1), (3, 8, 1, 1, 1), (6, 4, 1, 1, 1),
        (6, 2, 1, 2, 1), (1, 6, 1, 4, 1), (3, 2, 2, 2, 1), (3, 4, 1, 2, 1), (1, 2, 1, 4, 2), (12, 2, 1, 1, 1),
        (1, 12, 1, 2, 1), (4, 2, 1, 1, 1), (1, 3, 4, 2, 1),
    ],
)  # fmt: skip
def test_split_sequences_count(dp, gather, exchange, mp, stages):
    check_groups(dp, mp, stages, gather, exchange)


@pytest.mark.parametrize(
    ("dp", "gather", "exchange", "mp", "group"),
    # each of them refused by MindSpore: "Create communication group failed"
    [
        (2, 3, 1, 4, ("data_parallel 2", 0, 12)),
        (1, 2, 6, 2, ("context_parallel 12", 2, 0, 12)),
        (1, 4, 3, 2, ("context_parallel 12", 4, 0, 6, 12, 18)),
    ],
)
def test_groups_of_split_sequences_that_nodes_do_not_have_are_refused(dp, gather, exchange, mp, group):
    with refused(*group):
        check_groups(dp, mp, 1, gather, exchange)


def test_a_plan_counts_its_context_parallel_devices():
    """Refused when context_parallel was left out: a node's devices, three of which are no group."""
    from research.telechat2.config.check import check
    from research.telechat2.config.preflight import read_settings

    changes = {"data_parallel": 3, "context_parallel": 8, "model_parallel": 1}
    changes = {f"parallel_config.{key}": value for key, value in changes.items()}
    settings = read_settings("finetune_telechat_7b", changes, Path.cwd())[1]
    assert check(settings).device_num == 24
