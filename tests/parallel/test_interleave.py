"""Layers in copies: the numbers of plain layers, and their communication, in twice as many halves."""

import re
from collections import Counter

import numpy as np
import pytest
from model_fixtures import RandomModel, int32, loss_and_gradients
from parallel_cells import MODEL, PLAN, compiled
from refusal import refused

from research.telechat2.plan.dry_run.simulate import simulate
from research.telechat2.telechat_config import TelechatConfig

COPIES = {"fine_grain_interleave": 2, "parallel_config": {"model_parallel": 2}}


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    sizes = {"hidden_size": 128, "n_head": 4, "num_key_value_heads": 2, "n_layer": 3}
    return RandomModel(tmp_path_factory.mktemp("copies"), ffn_hidden_size=192, vocab_size=256, **sizes)


@pytest.mark.parametrize(
    "fields",
    [
        {"sigma": 0.02},
        {
            "document_start_ids": [5],
            "parallel_config": {"model_parallel": 2, "recompute": {"recompute": True}},
        },
    ],
)
def test_copies_change_no_number(random, fields):
    ids = int32(np.random.default_rng(0).integers(4, 256, (2, 17)))
    plain = {**fields, "parallel_config": {}}
    expected = loss_and_gradients(random.build(seq_length=16, **plain))(ids, ids)
    found = loss_and_gradients(random.build(seq_length=16, **COPIES | fields))(ids, ids)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=0, atol=1e-6, err_msg=name)


def of_layers(report):
    """How often layers communicate what, but for gradients and weights."""
    found = Counter()
    for c in report.collectives:
        if "layers." in c.scope and c.role not in ("gradient", "weight"):
            found[c.phase, c.kind, c.input.dtype, c.input.shape] += c.count
    return found


def sent(report):
    """Bytes by phase and role."""
    found = Counter()
    for c in report.collectives:
        found[c.phase, c.role] += c.bytes * c.count
    return found


def halved(found):
    """Twice as many tensors of half the tokens."""
    return {
        (phase, kind, dtype, (tokens // 2, hidden)): 2 * count
        for (phase, kind, dtype, (tokens, hidden)), count in found.items()
    }


def assert_halved(copies, plain):
    assert of_layers(copies) == halved(of_layers(plain))
    assert sent(copies) == sent(plain)  # all else as well: embedding, last norm, gradients, loss


LAYERS = 3


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory):
    """The report on layers in copies, on one stage, and the text of the compiled graph."""
    folder = tmp_path_factory.mktemp("one_stage")
    config = MODEL | {"num_layers": LAYERS, "fine_grain_interleave": 2, "parallel_config": PLAN}
    report = simulate("parallel_cells:build", {"config": config}, device_num=8, folder=folder)
    (graph,) = folder.glob("ir/rank_0/*_validate_*.ir")
    return report, graph.read_text().splitlines()


def test_layers_send_as_many_bytes_in_twice_as_many_halves(one_stage):
    plain = compiled(num_layers=LAYERS)
    found = of_layers(plain)
    assert len(found) == 4 and set(found.values()) == {2 * LAYERS}
    assert_halved(one_stage[0], plain)


@pytest.mark.parametrize(
    ("plan", "rank"),
    [
        ({"recompute": {"select_recompute": True, "select_comm_recompute": [2, 1]}}, 0),
        pytest.param({"recompute": {"select_recompute": True, "select_comm_recompute": [2, 1]}}, 8,
                     marks=pytest.mark.slow),
        pytest.param({"recompute": {"recompute": True, "recompute_slice_activation": True}}, 0,
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_so_do_stages_of_a_pipeline_that_compute_again(plan, rank):
    plan = plan | {"pipeline_stage": 2, "micro_batch_num": 2}
    parallel = {
        "pipeline_stages": 2,
        "enable_parallel_optimizer": True,
        "parallel_optimizer_config": {"parallel_optimizer_threshold": 0},
    }
    plain, copies = (compiled(plan, parallel, rank, num_layers=4, fine_grain_interleave=n) for n in (1, 2))
    assert any(phase == "recompute" for phase, *_ in of_layers(plain))
    assert_halved(copies, plain)


def nodes(graph):
    """Of each node of a graph without functions: its operator, its text, and its operands' numbers."""
    found = {}
    for line in graph[next(i for i, line in enumerate(graph) if line.startswith("subgraph @")) :]:
        if node := re.match(r"  %(\d+)\(.*?\) = (?:PrimFunc_)?(\w+)\((.*?)\) (?:\{|cnode|primitive)", line):
            found[int(node[1])] = node[2], line, [int(n) for n in re.findall(r"%(\d+)", node[3])]
        if line.startswith("}"):
            break
    return found


def copy_of(text):
    found = re.search(r"\bmicro_interleaved_index: U64\((\d)\)", text)
    return int(found[1]) if found else None


def test_no_copys_communication_needs_anything_of_the_other(one_stage):
    """What attention gives to all tokens counts as given; Depend's second operand is order alone."""
    graph = nodes(one_stage[1])
    given = ("FlashAttentionScore", "FlashAttentionScoreGrad", "Concat", "SplitWithSize")
    communication = [n for n, (kind, text, _) in graph.items() if kind in ("AllGather", "ReduceScatter") and
                     copy_of(text) is not None]  # fmt: skip
    assert Counter(copy_of(graph[n][1]) for n in communication) == {0: 8 * LAYERS, 1: 8 * LAYERS}
    for start in communication:
        seen, left = set(), [start]
        while left:
            kind, _, operands = graph[left.pop()]
            operands = operands[:1] if kind == "Depend" else operands
            new = {n for n in operands if n in graph and graph[n][0] not in given} - seen
            seen |= new
            left += new
        other = {n for n in seen if copy_of(graph[n][1]) not in (None, copy_of(graph[start][1]))}
        assert not other, (start, other)


def test_copies_are_joined_for_attention_only_and_mindspore_orders_every_block(one_stage):
    graph = nodes(one_stage[1])
    joined = [text for kind, text, _ in graph.values() if kind == "Concat" and ", I64(0))" in text]
    # queries, and keys with values, of each layer; embedding, last layer and last norm
    assert len(joined) == 2 * LAYERS + 3
    # before the first attention, between two, and after the last: forward and backward
    begins = [text for _, text, _ in graph.values() if "micro_interleaved_depend_begin" in text]
    assert len(begins) == 2 * (LAYERS + 1)


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"fine_grain_interleave": 3}, ("fine_grain_interleave", 3)),
        ({"fine_grain_interleave": 0}, ("fine_grain_interleave", 0, 1)),
        (
            {"seq_length": 2, "parallel_config": {"model_parallel": 2, "use_seq_parallel": True}},
            ("batch_size 1", "seq_length 2", 4, "fine_grain_interleave 2"),
        ),
        (
            {
                "moe_config": {"expert_num": 4, "num_experts_chosen": 2, "capacity_factor": 1.5},
                "parallel_config": {"model_parallel": 2, "use_seq_parallel": True},
            },
            ("fine_grain_interleave", 2, 1),
        ),
    ],
)
def test_what_copies_cannot_be_is_refused(fields, values):
    with refused(*values):
        TelechatConfig(**COPIES | fields)


def test_without_tensor_parallelism_there_is_nothing_to_hide(random):
    model = random.build(seq_length=16, fine_grain_interleave=2)
    assert {type(layer).__name__ for layer in model.model.layers} == {"TelechatDecoderLayer"}
