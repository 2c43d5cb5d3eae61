"""What a layer of experts communicates on a cluster, read from the compiled graph."""

import re
from collections import Counter

import numpy as np
import pytest
from oracle_moe import capacity
from test_moe_region import LAYOUTS, cut

from research.telechat2.parallel.experts import ExpertPlan
from research.telechat2.plan.dry_run.graph import TensorType
from research.telechat2.plan.dry_run.simulate import Report, simulate

MATRIX, RANK = (2, 2, 4), 5  # replicas, expert_parallel, model_parallel; the rank is in places (0, 1, 1)
TOKENS, E, K, H, F = 512, 16, 4, 128, 256
SHARDED = {
    "enable_parallel_optimizer": True,
    "parallel_optimizer_config": {"parallel_optimizer_threshold": 0},
}
# A layer for each of them: the arguments of its plan but for the rank, and its capacity_factor.
LAYERS = {
    "experts": ((*MATRIX, *LAYOUTS["experts"]), 1.2),
    "widths": ((*MATRIX, *LAYOUTS["widths"]), 1.2),
    "widths-of-the-same-tokens": ((*MATRIX, *LAYOUTS["widths-of-the-same-tokens"]), 1.2),
    "dropless": ((*MATRIX, *LAYOUTS["experts"]), 0.0),
    "dropless-by-data": ((2, 8, 1, False, False), 0.0),
    "dropless-alone": ((16, 1, 1, True, True), 0.0),
}
NAMES = ("ffn.w1.weight", "ffn.w3.weight", "ffn.w2.weight")


def compiled(layers: dict, sizes: dict, **cluster) -> Report:
    layers = [{"plan": plan, "capacity_factor": factor} for plan, factor in layers.values()]
    return simulate("region_cells:build", {"layers": layers, **sizes}, **cluster)


@pytest.fixture(scope="module", params=["weights-everywhere", "weights-shared"])
def report(request) -> Report:
    """All layers in one graph; where weights are shared out, each replica keeps a part for its optimizer."""
    sizes = {"tokens": TOKENS, "num_experts": E, "hidden": H, "width": F, "top_k": K}
    shared = request.param == "weights-shared"
    return compiled(LAYERS, sizes, device_num=16, rank=RANK, parallel=SHARDED if shared else None)


def of_layer(report: Report, name: str, layers=LAYERS) -> list:
    scope = f"network.layers.{list(layers).index(name)}"
    return [c for c in report.collectives if c.scope == scope or c.scope.startswith(scope + ".")]


def inside(report: Report, name: str, layers=LAYERS) -> Counter:
    """What the region communicates. MindSpore knows no ranks of a group made by hand while it simulates, so
    the group's name has to say them.
    """
    return Counter(
        (c.phase, c.kind, c.group, c.input, c.output)
        for c in of_layer(report, name, layers)
        if "_block" in c.scope and not c.parameter
    )


def both_ways(*collectives) -> Counter:
    """Each of them once forward and once backward, where in- and output have changed places."""
    found = Counter(("forward", *collective) for collective in collectives)
    opposite = {"AllGather": "ReduceScatter", "ReduceScatter": "AllGather"}
    for kind, group, given, got in collectives:
        found["backward", opposite.get(kind, kind), group, got, given] += 1
    return found


def block(tokens: int, hidden: int = H) -> TensorType:
    """All experts' rows from some tokens."""
    return TensorType("BFloat16", (E * capacity(tokens, K, E, 1.2), hidden))


def test_whole_experts_take_one_exchange_there_and_one_back(report):
    rows = block(TOKENS // 16)
    exchange = ("AlltoAll", "experts-0-1-to-7", rows, rows)
    assert inside(report, "experts") == both_ways(exchange, exchange)


def test_parts_of_experts_gather_rows_and_add_up_results(report):
    rows, gathered = block(TOKENS // 16), TensorType("BFloat16", (4 * block(TOKENS // 16).shape[0], H))
    exchange, widths = ("AlltoAll", "experts-1-5-to-5", rows, rows), "experts-4-5-to-7"
    assert inside(report, "widths") == both_ways(
        exchange,
        exchange,
        ("AllGather", widths, rows, gathered),
        ("ReduceScatter", widths, gathered, rows),
    )


def test_parts_of_experts_on_the_same_tokens_add_up_answers(report):
    rows, answers = block(TOKENS // 4), TensorType("BFloat16", (TOKENS // 4, H))
    exchange = ("AlltoAll", "experts-1-5-to-5", rows, rows)
    assert inside(report, "widths-of-the-same-tokens") == both_ways(
        exchange, exchange, ("AllReduce", "experts-4-5-to-7", answers, answers)
    )


@pytest.mark.parametrize("name", ["dropless", "dropless-by-data"])
def test_dropless_experts_exchange_counts_once_and_as_many_rows_as_there_are(report, name):
    assert inside(report, name) == dropless_exchange(TOKENS // 16, "experts-0-1-to-7", H)


def dropless_exchange(tokens: int, group: str, hidden: int) -> Counter:
    """With 8 owners: 2 tokens of zeros and 4 experts each reach them all."""
    rows, counts = TensorType("BFloat16", ((tokens + 2) * K * hidden,)), TensorType("Int32", (E,))
    dynamic = TensorType("BFloat16", (-1,))
    return Counter(
        {
            ("forward", "AlltoAll", group, counts, counts): 1,
            ("forward", "AlltoAllV", group, rows, dynamic): 1,
            ("forward", "AlltoAllV", group, dynamic, dynamic): 1,
            ("backward", "AlltoAllV", group, dynamic, dynamic): 2,
        }
    )


def test_dropless_experts_that_are_everywhere_exchange_nothing(report):
    assert inside(report, "dropless-alone") == Counter()


@pytest.mark.parametrize("name", LAYERS)
def test_outside_of_the_region_only_shares_of_tokens_are_added_up(report, name):
    """So the operators around it need no redistribution, in either direction."""
    shares = TensorType("Float32", (3, E))
    tokens = (1, 5, 9, 13) if name == "widths-of-the-same-tokens" else tuple(range(16))
    found = Counter(
        (c.phase, c.kind, c.ranks, c.input)
        for c in of_layer(report, name)
        if "_block" not in c.scope and not c.parameter and c.input.shape not in ((), (1,))
    )
    assert found == {(phase, "AllReduce", tokens, shares): 1 for phase in ("forward", "backward")}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_added_up_over_the_devices_that_have_the_same_weights(report, name):
    plan = ExpertPlan(*LAYERS[name][0], rank=RANK)
    # Replicas are 8 ranks apart; everyone has routers and biases, and norms, and tokens or parts of answers.
    everyone = tuple(range(16))
    same = everyone if name == "dropless-alone" else (5, 13)
    rows, columns = (E // plan.owners, F // plan.width_parts, H), (E // plan.owners, H, F // plan.width_parts)
    expected = {
        "moe.ffn.w1.weight": (same, rows), "moe.ffn.w3.weight": (same, rows),
        "moe.ffn.w2.weight": (same, columns), "moe.ffn.w2.bias": (everyone, (1, E, 1, H)),
        "moe.router.dense.weight": (everyone, (E, H)), "norm": (everyone, (H,)),
    }  # fmt: skip
    prefix = f"network.layers.{list(LAYERS).index(name)}."
    gradients = [c for c in report.collectives if c.role == "gradient" and c.parameter.startswith(prefix)]
    assert {c.parameter.removeprefix(prefix): (c.ranks, c.input.shape) for c in gradients} == expected
    assert len(gradients) == len(expected) and {c.input.dtype for c in gradients} == {"Float32"}


@pytest.mark.parametrize("name", LAYERS)
def test_mindspore_cuts_weights_as_the_exchange_takes_them(report, name):
    """Its layout of each parameter, by which checkpoints are cut, gives the slices of the plan."""
    plan = ExpertPlan(*LAYERS[name][0], rank=RANK)
    found = {p.name: p for p in report.parameters}
    for parameter, layout in zip(NAMES, (plan.weight_layouts()[i] for i in (0, 0, 1)), strict=True):
        parameter = found[f"network.layers.{list(LAYERS).index(name)}.moe.{parameter}"]
        assert len(parameter.tensor_map) == 3
        numbers = np.arange(np.prod(parameter.shape), dtype=np.int32).reshape(parameter.shape)
        mine = cut(numbers, layout, RANK)
        assert parameter.slice_shape == mine.shape
        place = np.unravel_index(RANK, parameter.device_matrix)
        for axis, split in enumerate(parameter.tensor_map):
            if split >= 0:
                numbers = np.split(numbers, parameter.device_matrix[-1 - split], axis)[place[-1 - split]]
        np.testing.assert_array_equal(numbers, mine)
        # Of its slice, each replica keeps a part for its optimizer where they share it out, else all of it.
        parts = 16 // (plan.owners * plan.width_parts) if parameter.optimizer_shard else 1
        assert parameter.local_shape == (mine.shape[0] // parts, *mine.shape[1:])


def test_optimizers_share_out_the_experts_of_a_device(report):
    gathered = [c for c in report.collectives if c.role == "weight" and c.parameter.endswith(NAMES)]
    shared = [p for p in report.parameters if p.name.endswith(NAMES) and p.optimizer_shard]
    assert len(gathered) == len(shared) and len(shared) in (0, 3 * len(LAYERS))
    assert {c.input.dtype for c in gathered} <= {"BFloat16"}


def test_products_are_those_of_bfloat16(report):
    products = [o for o in report.operators if o.kind in ("BatchMatMul", "GroupedMatmul", "Swiglu")]
    of_experts = [o for o in products if o.scope.endswith((".experts", ".product", ".swiglu"))]
    assert {o.kind for o in of_experts} == {"BatchMatMul", "GroupedMatmul", "Swiglu"}
    for operator in of_experts:
        assert {t.dtype for t in (*operator.inputs, *operator.outputs)} - {"Int64"} == {"BFloat16"}


def test_grouped_products_make_no_copies_of_weights(tmp_path):
    """Experts on one device: nine products for training, three for prediction; all turning is by views."""
    sizes = {"tokens": 32, "num_experts": 4, "hidden": 64, "width": 48, "top_k": 2}
    folder = tmp_path / "dry"
    report = simulate("region_cells:build_dropless", sizes, device_num=1, folder=folder)
    shapes = Counter(
        (o.inputs[0].shape, o.inputs[1].shape, o.outputs[0].shape)
        for o in report.operators
        if o.kind == "GroupedMatmul"
    )
    up, down = ((64, 64), (4, 64, 48), (64, 48)), ((64, 48), (4, 48, 64), (64, 64))
    assert shapes == {
        # Forward of both kinds, and gradients of rows, where w2's have the shapes of w1's products.
        up: 2 + 2 + 1, down: 1 + 1 + 2,
        ((48, 64), (64, 64), (4, 48, 64)): 2,  # gradients of w1 and w3, as they are stored
        ((64, 64), (64, 48), (4, 64, 48)): 1,  # of w2
    }  # fmt: skip
    assert {t.dtype for o in report.operators if o.kind == "GroupedMatmul" for t in o.outputs} == {"BFloat16"}
    (graph,) = (folder / "ir" / "rank_0").glob("*_validate_*.ir")
    turned = Counter(re.findall(r"= PrimFunc_(Transpose\w*)\(", graph.read_text()))
    assert turned == {"TransposeExtView": 6}


@pytest.mark.slow
def test_the_widths_of_39b_compile_for_1024_devices():
    hidden, local = 4096, 2048
    layers = {name: ((128, *MATRIX[1:], *LAYERS[name][0][3:]), LAYERS[name][1]) for name in list(LAYERS)[:4]}
    sizes = {"tokens": 1024 * local, "num_experts": E, "hidden": hidden, "width": 6144, "top_k": K}
    report = compiled(layers, sizes, device_num=1024, rank=533)
    rows = block(local, hidden=hidden)
    exchange = ("AlltoAll", "experts-528-529-to-535", rows, rows)
    assert inside(report, "experts", layers) == both_ways(exchange, exchange)
    assert inside(report, "dropless", layers) == dropless_exchange(local, "experts-528-529-to-535", hidden)
    gathered = TensorType("BFloat16", (4 * rows.shape[0], hidden))
    exchange, widths = ("AlltoAll", "experts-529-533-to-533", rows, rows), "experts-532-533-to-535"
    assert inside(report, "widths", layers) == both_ways(
        exchange, exchange, ("AllGather", widths, rows, gathered), ("ReduceScatter", widths, gathered, rows)
    )
    rows, answers = block(4 * local, hidden=hidden), TensorType("BFloat16", (4 * local, hidden))
    exchange = ("AlltoAll", "experts-529-533-to-533", rows, rows)
    assert inside(report, "widths-of-the-same-tokens", layers) == both_ways(
        exchange, exchange, ("AllReduce", widths, answers, answers)
    )
    replicas = tuple(range(533 % 8, 1024, 8))
    gradients = [c for c in report.collectives if c.role == "gradient" and c.parameter.endswith(NAMES)]
    assert len(gradients) == 3 * len(layers) and {c.ranks for c in gradients} == {replicas}
    assert not [c for c in report.collectives if c.role == "redistribution"]
