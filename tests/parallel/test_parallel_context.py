"""What a layer communicates whose sequences are split over devices, read from the compiled graph."""

import re
from collections import Counter
from types import SimpleNamespace

import mindspore as ms
import pytest
from parallel_cells import MODEL, PLAN, compiled
from refusal import refused

from research.telechat2.parallel.strategies import apply_plan
from research.telechat2.plan.dry_run.graph import TensorType
from research.telechat2.plan.dry_run.simulate import simulate
from research.telechat2.telechat_config import TelechatConfig

SEQ, HEADS, KEY_HEADS, DIM = 256, 8, 4, 32  # as in MODEL
SPLIT = PLAN | {"data_parallel": 1, "model_parallel": 2, "context_parallel": 2}
EXCHANGE = {"enable_alltoall": True}


def of_context(report):
    """Number, group and bytes of all that layer 0 sends to devices with other tokens of its sequence."""
    found = Counter()
    for c in report.collectives:
        if "layers.0." in f"{c.scope}." and c.role not in ("gradient", "weight") and c.ranks != (0, 1):
            found[c.phase, c.kind, c.ranks, c.bytes] += c.count
    return found


def flash_inputs(report):
    flash = [o for o in report.operators if o.kind == "FlashAttentionScore"]
    assert len(flash) == 1
    return [t.shape for t in flash[0].inputs]


def part(heads, positions):
    """Bytes of bfloat16 heads at positions of one sequence."""
    return TensorType("BFloat16", (1, heads, positions, DIM)).bytes


def test_gathering_brings_keys_and_values_of_the_sequence_and_nothing_else():
    report = compiled(SPLIT, num_layers=1)
    sent = part(KEY_HEADS // 2, SEQ // 2)  # to the one other device
    assert of_context(report) == {
        ("forward", "AllGather", (0, 2), sent): 2,
        ("backward", "ReduceScatter", (0, 2), sent): 2,
    }
    queries, keys = (1, HEADS // 2, SEQ // 2, DIM), (1, KEY_HEADS // 2, SEQ, DIM)
    assert flash_inputs(report) == [queries, keys, keys, (2048, 2048)]


def test_ulysses_exchanges_heads_for_tokens_four_times_each_way():
    report = compiled(SPLIT | {"context_parallel_algo": "ulysses_cp"}, EXCHANGE, num_layers=1)
    queries, keys = part(HEADS // 2, SEQ // 2) // 2, part(KEY_HEADS // 2, SEQ // 2) // 2  # the half is kept
    assert of_context(report) == {
        (phase, "AlltoAll", (0, 2), sent): 2 for phase in ("forward", "backward") for sent in (queries, keys)
    }
    queries, keys = (1, HEADS // 4, SEQ, DIM), (1, KEY_HEADS // 4, SEQ, DIM)
    assert flash_inputs(report) == [queries, keys, keys, (2048, 2048)]


@pytest.mark.slow  # each alone is in the default tier
def test_both_together_with_packed_documents():
    """Each device makes its queries' part of the mask from the tokens that it has, and sends none of it."""
    plan = {"context_parallel": 4, "context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 2}
    report = compiled(SPLIT | plan, EXCHANGE, num_layers=1, document_start_ids=[5])
    queries, keys = part(HEADS // 2, SEQ // 4) // 2, part(KEY_HEADS // 2, SEQ // 4) // 2
    gathered = part(KEY_HEADS // 4, SEQ // 2)
    assert of_context(report) == {
        ("forward", "AlltoAll", (0, 2), queries): 2,
        ("forward", "AlltoAll", (0, 2), keys): 2,
        ("forward", "AllGather", (0, 4), gathered): 2,
        ("backward", "AlltoAll", (0, 2), queries): 2,
        ("backward", "AlltoAll", (0, 2), keys): 2,
        ("backward", "ReduceScatter", (0, 4), gathered): 2,
    }
    queries, keys = (1, HEADS // 4, SEQ // 2, DIM), (1, KEY_HEADS // 4, SEQ, DIM)
    assert flash_inputs(report) == [queries, keys, keys, (1, 1, SEQ // 2, SEQ)]
    assert not [c for c in report.collectives if "documents" in c.scope]


def test_around_attention_devices_have_their_tokens_only_and_add_up_gradients():
    report = compiled(SPLIT, num_layers=1)
    products = {o.outputs[0].shape for o in report.operators if o.kind == "MatMul" and o.phase == "forward"}
    assert {shape[0] for shape in products} == {SEQ // 2}
    gradients = [c for c in report.collectives if c.role == "gradient"]
    weights = {c.parameter: c.ranks for c in gradients if c.input.bytes > 4 * MODEL["hidden_size"]}
    assert len(weights) == 8 and set(weights.values()) == {
        (0, 2)
    }  # embedding, output, three of attention, three of the feed-forward


@pytest.mark.parametrize("place", [0, 1])
def test_a_devices_queries_see_the_keys_up_to_their_own_positions(tmp_path, place):
    """CANN's band (sparse mode 4) counts from the last query and key; query i sees keys up to i + offset."""
    arguments = {"config": MODEL | {"num_layers": 1, "parallel_config": SPLIT}}
    simulate("parallel_cells:build", arguments, device_num=4, rank=2 * place, folder=tmp_path / "run")
    (dump,) = (tmp_path / "run" / "ir").rglob("*_validate_*.ir")
    call = re.search(r"PrimFunc_FlashAttentionScore\((.*)", dump.read_text()).group(1).partition("{")[0]
    before, after, _, _, mode = [int(n) for n in re.findall(r"I64\((-?\d+)\)", call)][1:]
    assert mode == 4
    last = SEQ // 2 - 1
    assert last + (SEQ - SEQ // 2) + after == place * SEQ // 2 + last
    assert last + (SEQ - SEQ // 2) - before <= 0


def test_an_exchange_that_the_context_forbids_is_refused(monkeypatch):
    context = {"parallel_mode": "semi_auto_parallel", "gradients_mean": False, "enable_alltoall": False}
    monkeypatch.setattr(ms, "get_auto_parallel_context", context.__getitem__)
    monkeypatch.setattr(ms.communication, "get_group_size", lambda: 4)
    plan = SPLIT | {"context_parallel_algo": "ulysses_cp"}
    config = TelechatConfig(**MODEL | {"num_layers": 1, "parallel_config": plan})
    model = SimpleNamespace(model=SimpleNamespace(layers=[None]))
    with refused("ulysses_cp", 2, "enable_alltoall", False, True):
        apply_plan(model, config)
