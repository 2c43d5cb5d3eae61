"""Which layers and operators are computed again, and that this changes no number."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import RandomModel, int32, loss_and_gradients
from parallel_cells import compiled
from refusal import refused

from research.telechat2.config.recompute import first_layers
from research.telechat2.telechat_config import TelechatConfig

COUNTS_115B = [[3, 3, 4, 4, 4, 4, 4, 4], [3, 4, 4, 4, 4, 4, 4, 4], [4, 4, 4, 5, 5, 5, 5, 3]]


@pytest.mark.parametrize(
    ("setting", "counts", "layers"),
    [
        (True, [[15, 17]], [[15, 17]]),
        (False, [[15, 17]], [[0, 0]]),
        ([3, 0], [[15, 15]], [[3, 0]]),
        ([True, 2], [[15, 15]], [[15, 2]]),
        ([[1, 2], [0, True]], [[2, 2], [3, 3]], [[1, 2], [0, 3]]),
        ([4, 3], [[1, 2], [3, 1]], [[1, 2], [3, 1]]),
        # 8 layers of a stage with chunks of 3, 3 and 4 are 3, 3 and 2; 11 of 4, 4 and 5 are 4, 4 and 3.
        (
            [8, 8, 10, 11, 10, 7, 5, 4],
            COUNTS_115B,
            [[3, 3, 4, 4, 4, 3, 2, 2], [3, 3, 3, 4, 3, 2, 2, 1], [2, 2, 3, 3, 3, 2, 1, 1]],
        ),
    ],
)
def test_settings_hold_for_the_first_layers_of_stages(setting, counts, layers):
    assert first_layers("recompute", setting, counts) == layers


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_a_stages_number_is_dealt_evenly_to_its_chunks(counts, data):
    number = data.draw(st.integers(0, sum(counts)))
    dealt = [row[0] for row in first_layers("recompute", [number], [[count] for count in counts])]
    assert sum(dealt) == number
    assert all(0 <= n <= count for n, count in zip(dealt, counts, strict=True))
    short = [n for n, count in zip(dealt, counts, strict=True) if n < count]
    assert not short or max(dealt) - min(short) <= 1


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ([1], ([1], "list of 2")),
        ([[1, 1]] * 2, ([[1, 1], [1, 1]], 1)),
        ([3, 17], (17, "stage 1", 16)),
        ([-1, 0], (-1, "stage 0")),
        ("all", ("recompute", "'all'")),
        (3, ("recompute", 3)),
        ([1.0, 1], ("recompute", [1.0, 1])),
    ],
)
def test_settings_that_fit_no_pipeline_are_refused(setting, values):
    with refused(*values):
        first_layers("recompute", setting, [[15, 16]])


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ({"recompute": [1, 1]}, ("recompute_config.recompute", [1, 1], "list of 1")),
        ({"select_recompute": {r"feed_forward\..*": [31]}}, ("select_recompute", 31, "stage 0")),
        ({"select_recompute_exclude": True}, ("select_recompute_exclude",)),
        ({"select_comm_recompute_exclude": True}, ("select_comm_recompute_exclude",)),
        ({"parallel_optimizer_comm_recompute": True}, ("optimizer_level: level3",)),
    ],
)
def test_a_config_refuses_what_it_would_ignore(section, values):
    with refused(*values):
        TelechatConfig(parallel_config={"recompute": section})


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return RandomModel(
        tmp_path_factory.mktemp("recompute"),
        hidden_size=128,
        n_head=2,
        n_layer=2,
        ffn_hidden_size=192,
        vocab_size=256,
    )


@pytest.mark.parametrize("section", [{"recompute": True}, {"recompute": [1], "select_recompute": True}])
def test_recomputation_changes_no_number(random, section):
    ids = int32(np.random.default_rng(0).integers(4, 256, (2, 17)))
    kept = loss_and_gradients(random.build(seq_length=16))(ids, ids)
    again = loss_and_gradients(random.build(seq_length=16, parallel_config={"recompute": section}))(ids, ids)
    np.testing.assert_allclose(again[0], kept[0], rtol=0, atol=1e-6)
    assert again[1].keys() == kept[1].keys()
    for name, gradient in kept[1].items():
        np.testing.assert_allclose(again[1][name], gradient, rtol=0, atol=1e-6, err_msg=name)


def test_a_pattern_without_operators_lists_those_there_are(random):
    section = {"select_recompute": [r"feed_forward\.mul"]}
    with refused("recompute_config.select_recompute", repr(r"feed_forward\.mul"), "attention.wq.matmul"):
        random.build(seq_length=16, parallel_config={"recompute": section})


@pytest.fixture(scope="module")
def report():
    """Layer 0 computed again as a whole, layer 1 its SwiGLU and gathers, layer 2 its gathers."""
    section = {
        "recompute": [1],
        "select_recompute": {r"feed_forward\.swiglu\..*": [2]},
        "select_comm_recompute": [3],
    }
    return compiled({"data_parallel": 1, "model_parallel": 2, "recompute": section}, num_layers=3)


def again(report, layer, nodes):
    return Counter(n.kind for n in nodes if f"layers.{layer}" in n.scope and n.phase == "recompute")


def test_a_whole_layer_is_computed_again_but_for_its_last_product(report):
    found = again(report, 0, report.operators)
    once = Counter(o.kind for o in report.operators if "layers.0" in o.scope and o.phase == "forward")
    # w2, its bias and the residual sum after it give the layer's result, which is the next one's input.
    assert once - found == {"MatMul": 1, "Add": 2}
    assert not found - once


def test_selected_operators_alone_are_computed_again(report):
    assert again(report, 1, report.operators) == {"Swiglu": 1}
    assert not again(report, 2, report.operators)


def test_gathers_of_layers_are_repeated_where_asked(report):
    for layer in (1, 2):
        assert again(report, layer, report.collectives) == {"AllGather": 2}
    # With the whole layer attention's result is scattered again: the residual stream between is not kept.
    assert again(report, 0, report.collectives) == {"AllGather": 2, "ReduceScatter": 1}


@pytest.mark.slow
def test_without_communication_a_layer_is_computed_again_from_what_was_gathered():
    section = {"recompute": True, "mp_comm_recompute": False}
    report = compiled({"data_parallel": 1, "model_parallel": 2, "recompute": section}, num_layers=1)
    assert not again(report, 0, report.collectives)
    assert again(report, 0, report.operators)["FlashAttentionScore"] == 1
