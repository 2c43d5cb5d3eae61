"""The estimate against numbers worked out by hand, published parameter counts, memory limits and speeds."""

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from refusal import refused

from benchmarks.fit_estimate import errors, fit, leave_one_out, published_workloads
from research.telechat2.config.preflight import read_settings
from research.telechat2.plan.estimate.communication import (
    Communication,
    layer_communication,
    stage_communication,
)
from research.telechat2.plan.estimate.costs import link_seconds
from research.telechat2.plan.estimate.estimate import FITTED, estimate, model_flops_per_token
from research.telechat2.plan.estimate.memory import layer_activations, layer_input, stage_parameters
from research.telechat2.plan.estimate.workload import workload


def settings_of(name: str, **changes) -> dict:
    """Of a shipped YAML; ``a__b`` is ``a.b``."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return read_settings(name, changes, Path.cwd())[1]


@pytest.fixture(scope="module")
def published():
    return published_workloads()


# Of spec 1.1, where they are those of the published checkpoints.
@pytest.mark.parametrize(
    ("size", "numbers"),
    [("7b", 7_617_351_680), ("35b", 35_435_059_200), ("115b", 113_282_916_352), ("39b_a12b", 39_330_099_200)],
)
def test_all_stages_together_have_the_published_number_of_parameters(published, size, numbers):
    run = published[size]
    trained = [p for stage in range(run.pp) for p in stage_parameters(run, stage) if p.trained]
    assert sum(prod(p.shape) for p in trained) == numbers


def test_zero_shares_all_but_vectors_out_to_eight_npus(published):
    """7B: 7,616,888,832 numbers in matrices, 462,848 - 113 vectors of 4096 - in norms and biases."""
    found = estimate(settings_of("finetune_telechat_7b"))
    vectors = 4096 * (30 * 4 + 1)
    own = (7_617_351_680 - vectors) // 8 + vectors
    (memory,) = found.memory
    assert memory.parameters == memory.gradients == 4 * own
    assert memory.optimizer == 2 * 4 * own


def test_weights_are_kept_in_the_dtype_that_they_are_computed_in():
    """35B's second stage: 17 layers of 528,506,880 numbers; but for 4 vectors of 6144, a quarter of them."""
    memory = estimate(settings_of("finetune_telechat_35b")).memory[1]
    assert memory.gathered == 2 * 17 * (528_506_880 - 4 * 6144) // 4


def test_published_plans_fit_the_memory_that_they_were_published_with(published):
    """``context.max_device_memory`` of spec 11."""
    limits = {"7b": 58, "35b": 57, "115b": 54.5, "39b_a12b": 53}
    for size, limit in limits.items():
        found = estimate(settings_of(f"finetune_telechat_{size}"))
        assert found.peak_bytes <= limit * 1e9


def test_published_speeds_are_met_with_two_constants(published):
    found = errors(published, FITTED)
    assert max(map(abs, found.values())) < 0.05, found
    fitted = fit(published)
    assert (fitted.compute, fitted.links) == pytest.approx((FITTED.compute, FITTED.links), abs=0.01)


def test_each_published_speed_is_predicted_from_the_three_others(published):
    found = leave_one_out(published)
    assert max(map(abs, found.values())) < 0.15, found


def test_a_layers_activations_are_those_counted_by_hand():
    """7B: a token has 4096 channels of float32 twice, of bfloat16 six times, and three widths of bfloat16.

    Both norms' inputs; both blocks' inputs, rotated queries and keys, values, attention's result; gate, up,
    their product; and eight float32 maxima and sums of each of 32 heads.
    """
    run = workload(settings_of("finetune_telechat_7b"))
    token = 2 * 4 * 4096 + 6 * 2 * 4096 + 3 * 2 * 12288 + 32 * 2 * 8 * 4
    assert layer_activations(run) == 8192 * token
    assert layer_activations(run, selected=True) == 8192 * (token - 2 * 12288)
    assert layer_input(run) == 8192 * 4096 * 4
    split = replace(run, mp=4, sequence_parallel=True, vocab_parts=4)
    inputs = 2 * 2 * 4096  # gathered, so whole on each device
    assert layer_activations(split) == 8192 * ((token - inputs) // 4 + inputs)
    assert layer_activations(split, regathered=True) == 8192 * token // 4


def test_a_layer_sends_the_least_that_sequence_parallelism_needs(published):
    """Two gathers and two scatters each way of 8192 x 6144 in bfloat16, three quarters of it leaving."""
    run = replace(published["35b"], recomputed=[[0] * 4])
    each = 8192 * 6144 * 2 * 3 // 4
    assert sum(item.bytes for item in layer_communication(run, False, False)) == 8 * each
    assert sum(item.bytes for item in layer_communication(run, True, False)) == 11 * each
    assert sum(item.bytes for item in layer_communication(run, False, True)) == 10 * each


def test_split_sequences_send_heads_and_keys(published):
    """7B on four parts of a sequence, two of which exchange heads, and then gather keys with the others.

    A device has 2048 tokens. Four times (queries, keys, values, answers) half of 2048 x 4096 in bfloat16
    leaves it for other heads, 8 MiB; twice (keys, values) what it then has of them, 4096 x 2048, 16 MiB.
    """
    run = replace(published["7b"], dp=2, gather=2, exchange=2, recomputed=[[0]])
    found = layer_communication(run, False, False)
    for phase in ("forward", "backward"):
        assert sum(item.bytes for item in found if item.phase == phase) == (4 * 8 + 2 * 16) * 2**20
    assert {item.kind: item.stride for item in found} == {"AlltoAll": 1, "AllGather": 2, "ReduceScatter": 2}
    assert (run.devices, run.tokens, run.step_tokens) == (8, 2048, 2 * 8192 * run.micro_batches)


def test_gradients_and_weights_are_communicated_once_a_step(published):
    run = published["7b"]
    vectors = 4096 * (30 * 4 + 1)
    matrices = 7_617_351_680 - vectors
    embedding = 131072 * 4096
    sent = {(item.kind, item.what): item.bytes for item in stage_communication(run, 0)}
    assert sent == {
        ("AllGather", "weights"): (2 * (matrices - embedding) + 4 * embedding) * 7 // 8,
        ("ReduceScatter", "gradients"): 4 * matrices * 7 // 8,
        ("AllReduce", "gradients"): 2 * (4 * vectors * 7 // 8),
    }


def test_operations_of_a_token_are_six_for_each_weight_and_those_of_attention(published):
    run = published["7b"]
    matrices = 7_617_351_680 - 4096 * 121 - 131072 * 4096
    assert model_flops_per_token(run) == 6 * matrices + 6 * 30 * 8192 * 4096
    active = 12_149_534_720 - 131072 * 4096  # spec 1.1; router and biases are a thousandth of a hundredth
    moe = published["39b_a12b"]
    assert model_flops_per_token(moe) == pytest.approx(6 * active + 6 * 30 * 8192 * 4096, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "seconds"),
    [
        ("AllGather", 8, 1, 8e9 / 8 / 28e9),  # each link carries an eighth
        ("AllReduce", 2, 4, 2 * 8e9 / 2 / 28e9),
        ("ReduceScatter", 16, 8, 8e9 * 15 / 16 / 25e9),  # one NPU of each node
        ("AllGather", 16, 1, 8e9 / 8 / 28e9 + 8e9 / 8 / 2 / 25e9),  # across two nodes, then within
        ("AlltoAll", 16, 1, 8e9 / 16 * 8 / 25e9),  # half of the tensor leaves the node
        ("Send", 2, 8, 8e9 / 25e9),
        ("Send", 2, 4, 8e9 / 28e9),
    ],
)
def test_links_are_used_as_a_node_has_them(kind, ranks, stride, seconds):
    item = Communication(kind, "data", "forward", "weights", ranks, stride, 8_000_000_000)
    assert link_seconds(item) == pytest.approx(seconds)


def test_an_estimate_is_a_table_and_json():
    found = estimate(settings_of("finetune_telechat_115b"))
    text = found.table()
    assert len(re.findall(r"^stage \d", text, re.M)) == 8
    report = json.loads(json.dumps(found.as_dict()))
    for stage in report["stages"]:
        parts = {name: size for name, size in stage["memory"].items() if name != "total"}
        assert stage["memory"]["total"] == sum(parts.values())
    assert report["throughput"]["tokens_per_second"] == found.throughput.tokens_per_second


def test_what_is_not_estimated_is_refused():
    patterns = settings_of("finetune_telechat_7b", recompute_config__select_recompute={".*": True})
    with refused("recompute_config.select_recompute", "--dry_run"):
        estimate(patterns)
    level = settings_of("finetune_telechat_7b")
    level["parallel"]["parallel_optimizer_config"]["optimizer_level"] = "level2"
    with refused("optimizer_level", "level2", "--dry_run"):
        estimate(level)
