"""Which stage holds which layers: the published partitions, every legal one, and a compiled pipeline."""

import ast
import re

import mindspore as ms
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_cells import MODEL, compiled
from refusal import refused

from research.telechat2.config.pipeline import partition, places
from research.telechat2.parallel.pipeline import assign_stages
from research.telechat2.plan.dry_run.graph import TensorType
from research.telechat2.telechat_config import TelechatConfig


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "offset", "counts"),
    [
        (64, 4, 1, [-1, 1, 1, -1], [[15, 17, 17, 15]]),
        (30, 2, 1, 0, [[15, 15]]),
        (
            96, 8, 3,
            [[-1, -1, 0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, -1]],
            [[3, 3, 4, 4, 4, 4, 4, 4], [3, 4, 4, 4, 4, 4, 4, 4], [4, 4, 4, 5, 5, 5, 5, 3]],
        ),
        (30, 1, 1, 0, [[30]]),
        (6, 2, 3, [0, 0], [[1, 1]] * 3),
        (4, 3, 1, [-1, 2, 0], [[0, 3, 1]]),
    ],
)  # fmt: skip
def test_the_published_partitions(layers, stages, chunks, offset, counts):
    assert partition(layers, stages, chunks, offset) == counts


tables = st.integers(1, 6).flatmap(
    lambda stages: st.lists(
        st.lists(st.integers(1, 5), min_size=stages, max_size=stages), min_size=1, max_size=3
    )
)


@settings(deadline=None)
@given(tables)
def test_every_partition_can_be_asked_for_and_places_each_layer_once(counts):
    chunks, stages = len(counts), len(counts[0])
    layers = sum(map(sum, counts))
    base = layers // (stages * chunks)
    assert partition(layers, stages, chunks, [[n - base for n in row] for row in counts]) == counts
    found = places(counts)
    assert len(found) == len(set(found)) == layers
    # Layers follow each other through the stages of a chunk, and then through those of the next.
    assert [(place.chunk, place.stage) for place in found] == sorted((p.chunk, p.stage) for p in found)
    for chunk in range(chunks):
        for stage in range(stages):
            numbers = [p.number for p in found if (p.chunk, p.stage) == (chunk, stage)]
            assert numbers == list(range(counts[chunk][stage]))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3))
def test_a_wrong_sum_is_told_with_a_right_example(layers, stages, chunks):
    remainder = layers % (stages * chunks)
    if layers < stages * chunks or not remainder:
        return
    with refused(remainder) as raised:
        partition(layers, stages, chunks, 0)
    example = ast.literal_eval(re.search(r"\[\[.*\]\]|\[.*\]", str(raised.value))[0])
    assert sum(map(sum, partition(layers, stages, chunks, example))) == layers


@pytest.mark.parametrize(
    ("offset", "values"),
    [
        (1, ("offset is 1", "4 layers", "8 layers", "4 stages", "2 each", "0 more")),
        ([1, 0, 0, 0], ([1, 0, 0, 0], "1 layers")),
        ([0, 0, 0], ([0, 0, 0], 4, "pipeline_stage")),
        ([[0, 0, 0, 0]] * 2, ("pp_interleave_num", 4)),
        ([0.0, 0, 0, 0], ([0.0, 0, 0, 0],)),
        (True, (True,)),
        ("0", ("'0'",)),
        ([2, -2, 0, 0], ([4, 0, 2, 2], 8)),
        ([-3, 3, 0, 0], ([-1, 5, 2, 2],)),
    ],
)
def test_impossible_offsets_are_refused(offset, values):
    with refused(*values):
        partition(8, 4, 1, offset)


def config(stages=2, chunks=1, **fields):
    plan = {"pipeline_stage": stages, "micro_batch_num": stages}
    return TelechatConfig(num_layers=12, parallel_config=plan, pp_interleave_num=chunks, **fields)


@pytest.fixture
def context():
    """Sets MindSpore's parallel context for one test."""
    yield ms.set_auto_parallel_context
    ms.reset_auto_parallel_context()


def test_a_context_for_another_pipeline_is_refused(context):
    with refused("parallel_config.pipeline_stage", 2, "1 stages", "parallel.pipeline_stages"):
        assign_stages(None, config())
    context(pipeline_stages=2)
    with refused("pp_interleave_num", 3, "pipeline_interleave", False):
        assign_stages(None, config(chunks=3))
    context(pipeline_config={"pipeline_interleave": True, "pipeline_scheduler": "1f1b"})
    with refused("pp_interleave_num", 1, "pipeline_interleave", True):
        assign_stages(None, config())
    context(pipeline_config={"pipeline_interleave": True, "pipeline_scheduler": "zero_bubble_v"})
    with refused("zero_bubble_v"):
        assign_stages(None, config(chunks=3))


CHUNKS = {
    "plan": {"model_parallel": 2, "data_parallel": 1, "pipeline_stage": 2, "micro_batch_num": 2},
    "parallel": {
        "pipeline_stages": 2,
        "pipeline_config": {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"},
    },
    "num_layers": 5, "pp_interleave_num": 2, "offset": [[0, 0], [0, 1]], "calculate_per_token_loss": True,
}  # fmt: skip


def held(report) -> set[str]:
    """The layers of which a stage has parameters, and the other cells."""
    names = [p.name for p in report.parameters if p.name.startswith(("model.", "lm_head."))]
    return {re.sub(r"^model\.(layers\.)?|\.(?![^.]*$).*|\.\w+$", "", name) for name in names}


def transfers(report, kind):
    activation = TensorType("Float32", (MODEL["seq_length"] // 2, MODEL["hidden_size"]))
    found = [c for c in report.collectives if c.kind == kind]
    assert {c.input for c in found} == {activation}
    return [(c.phase, c.micro_batch) for c in found]


def test_virtual_chunks_have_their_layers_and_pass_activations_on():
    first, last = (compiled(rank=rank, **CHUNKS) for rank in (0, 2))
    assert held(first) == {"tok_embeddings", "0", "2"}
    assert held(last) == {"1", "3", "4", "norm_out", "lm_head"}
    assert transfers(first, "Send") == transfers(last, "Receive")
    assert transfers(last, "Send") == transfers(first, "Receive")
    # Two micro-batches go from stage 0 to 1, back to 0 and to 1 again, and their gradients the other way.
    forward, backward = [("forward", 0), ("forward", 1)], [("backward", 0), ("backward", 1)]
    assert sorted(transfers(first, "Send")) == backward + sorted(forward * 2)
    assert sorted(transfers(last, "Send")) == sorted(backward * 2) + forward
    # Compiled once for all micro-batches, a layer communicates for each as it does alone.
    for layer in (1, 3, 4):
        inside = [c for c in last.collectives if f"layers.{layer}." in c.scope]
        assert sum(c.count for c in inside if c.role not in ("gradient", "weight")) == 2 * 8
