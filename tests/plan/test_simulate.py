"""A cluster's graph compiled without a cluster has the communication and the slices that theory demands."""

import sys
from collections import Counter

import pytest
from refusal import refused

from research.telechat2.plan.dry_run.graph import TensorType
from research.telechat2.plan.dry_run.simulate import STRATEGY, CompilationError, simulate

TOKENS, HIDDEN, WIDTH = 16, 64, 256  # as in plan_cells.py
ALL_SHARDED = {
    "enable_parallel_optimizer": True,
    "parallel_optimizer_config": {"parallel_optimizer_threshold": 0},
}


def run(*, device_num=8, rank=0, parallel=None, **arguments):
    return simulate("plan_cells:build", arguments, device_num=device_num, rank=rank, parallel=parallel)


def kinds(collectives):
    return Counter((c.phase, c.kind, c.ranks, c.input.shape) for c in collectives for _ in range(c.count))


@pytest.fixture(scope="module")
def tensor_parallel():
    return run(dp=2, mp=4, rank=5)


def test_two_matmuls_split_by_columns_and_rows_sum_once_in_each_direction(tensor_parallel):
    activation = (TOKENS // 2, HIDDEN)
    inside = [c for c in tensor_parallel.collectives if "blocks.0" in c.scope and not c.parameter]
    assert {c.role for c in inside} == {"operator"}
    assert kinds(inside) == {
        ("forward", "AllReduce", (4, 5, 6, 7), activation): 1,
        ("backward", "AllReduce", (4, 5, 6, 7), activation): 1,
    }


def test_gradients_are_summed_over_the_ranks_that_hold_the_same_slice(tensor_parallel):
    gradients = [c for c in tensor_parallel.collectives if c.role == "gradient"]
    assert {(c.parameter, c.kind, c.ranks, c.input) for c in gradients} == {
        ("blocks.0.up.weight", "AllReduce", (1, 5), TensorType("Float16", (WIDTH // 4, HIDDEN))),
        ("blocks.0.down.weight", "AllReduce", (1, 5), TensorType("Float16", (HIDDEN, WIDTH // 4))),
    }


def test_parameters_have_the_slices_of_their_strategies(tensor_parallel):
    found = {p.name: p for p in tensor_parallel.parameters}
    up, down = found["blocks.0.up.weight"], found["blocks.0.down.weight"]
    assert (up.dtype, up.shape, up.local_shape) == ("Float16", (WIDTH, HIDDEN), (WIDTH // 4, HIDDEN))
    assert (down.shape, down.local_shape) == ((HIDDEN, WIDTH), (HIDDEN, WIDTH // 4))
    assert up.bytes == 2 * WIDTH * HIDDEN // 4
    assert (up.device_matrix, up.tensor_map, up.optimizer_shard) == ((2, 4), (0, -1), "")
    assert found["adam_m.blocks.0.up.weight"].local_shape == up.local_shape


def test_operators_have_their_local_shapes(tensor_parallel):
    forward = [
        (o.scope.rpartition(".")[2], [t.shape for t in o.inputs], o.outputs[0].shape)
        for o in tensor_parallel.operators
        if o.kind == "MatMul" and o.phase == "forward"
    ]
    tokens, width = TOKENS // 2, WIDTH // 4
    assert forward == [
        ("up", [(tokens, HIDDEN), (width, HIDDEN)], (tokens, width)),
        ("down", [(tokens, width), (HIDDEN, width)], (tokens, HIDDEN)),
    ]


def test_an_optimizer_shard_is_gathered_once_and_its_gradient_scattered_once():
    report = run(dp=2, mp=4, parallel=ALL_SHARDED)
    up = next(p for p in report.parameters if p.name == "blocks.0.up.weight")
    assert (up.slice_shape, up.local_shape) == ((WIDTH // 4, HIDDEN), (WIDTH // 8, HIDDEN))
    assert up.optimizer_shard
    carried = [c for c in report.collectives if c.parameter == up.name]
    assert [(c.role, c.kind, c.ranks, c.input.shape) for c in carried] == [
        ("weight", "AllGather", (0, 4), (WIDTH // 8, HIDDEN)),
        ("gradient", "ReduceScatter", (0, 4), (WIDTH // 4, HIDDEN)),
    ]
    assert [c.bytes for c in carried] == [
        2 * WIDTH * HIDDEN // 8
    ] * 2  # half of the slice, in either direction


def test_a_strategy_that_does_not_fit_its_neighbours_shows_as_redistribution():
    # Split by tokens, the activation needs all columns of its tokens: an exchange on either side of it, of
    # which none is there where it is split by columns (the first test).
    report = run(dp=2, mp=4, relu=(8, 1))
    found = [c for c in report.collectives if c.role == "redistribution"]
    assert Counter(c.phase for c in found) == {"forward": 2, "backward": 2}
    assert {c.ranks for c in found} == {(0, 1, 2, 3)}


@pytest.mark.parametrize("reused", [False, True])
def test_recomputed_operators_are_told_from_their_first_run(reused):
    arguments = {"num_blocks": 2, "dp": 2, "mp": 2, "stages": 2, "micro_batches": 3}
    report = run(parallel={"pipeline_stages": 2}, recompute=True, reused=reused, **arguments)
    products = Counter()
    for operator in report.operators:
        if operator.kind == "MatMul":
            products[operator.phase, operator.scope.rpartition(".")[2]] += operator.count
    # ``up`` is recomputed for the gradients of ReLU and of ``down``; ``down``'s own result is not needed.
    # The block's input is the data, so ``up`` has the gradient of its weight alone.
    assert products == {
        ("forward", "up"): 3, ("forward", "down"): 3, ("recompute", "up"): 3,
        ("backward", "down"): 6, ("backward", "up"): 3,
    }  # fmt: skip


@pytest.mark.parametrize("reused", [False, True])
def test_stages_send_and_receive_in_pairs(reused):
    arguments = {"num_blocks": 2, "dp": 2, "mp": 2, "stages": 2, "micro_batches": 4, "reused": reused}
    first, last = (run(rank=rank, parallel={"pipeline_stages": 2}, **arguments) for rank in (1, 5))
    activation = TensorType("Float16", (TOKENS // 2, HIDDEN))

    def transfers(report, kind):
        return [
            (c.phase, c.ranks, c.micro_batch, c.input)
            for c in report.collectives
            if c.kind == kind and c.role == "pipeline"
        ]

    assert transfers(first, "Send") == transfers(last, "Receive")
    assert transfers(last, "Send") == transfers(first, "Receive")
    assert transfers(first, "Send") == [("forward", (1, 5), i, activation) for i in range(4)]
    assert transfers(last, "Send") == [("backward", (5, 1), i, activation) for i in range(4)]
    # Each stage sums its own block's product once for every micro-batch, whether compiled once or four times.
    for report, ranks in ((first, (0, 1)), (last, (4, 5))):
        sums = [c for c in report.collectives if ".down" in c.scope and c.role == "operator"]
        assert kinds(sums) == {
            (phase, "AllReduce", ranks, activation.shape): 4 for phase in ("forward", "backward")
        }
    assert {p.name for p in first.parameters if p.name.startswith("blocks")} == {
        "blocks.0.up.weight",
        "blocks.0.down.weight",
    }


def test_an_illegal_strategy_is_refused_with_the_operator_and_the_reason():
    with refused("MatMul", "16", "divisible", "3", kind=CompilationError):
        run(dp=3, mp=2)


def test_a_mistake_found_while_building_keeps_its_message():
    message = "hidden_size is 5, not a multiple of 2."
    with refused(message, "log.txt", kind=CompilationError):
        simulate("plan_cells:build_nothing", {"message": message}, device_num=2)


def test_a_crash_and_a_time_limit_name_the_log(monkeypatch):
    with refused("exit code 7", "log.txt", kind=CompilationError):
        simulate("plan_cells:build_crash", device_num=2)
    monkeypatch.setattr(sys.modules[simulate.__module__], "TIME_LIMIT", 8.0)
    with refused("8 s", "log.txt", kind=CompilationError):
        simulate("plan_cells:build_forever", device_num=2)


def test_files_are_kept_in_the_folder_that_is_named(tmp_path):
    simulate("plan_cells:build", {"dp": 2, "mp": 4}, device_num=8, folder=tmp_path / "dry")
    assert all((tmp_path / "dry" / name).exists() for name in (STRATEGY, "log.txt", "ir"))
