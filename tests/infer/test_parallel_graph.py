"""The parallel model's graphs compile for Ascend, with its fused kernels and collectives and nothing else."""

import re
from collections import Counter

import pytest

from research.telechat2.plan.dry_run.simulate import simulate

LAYERS = 2
SIZES = {
    "seq_length": 256, "hidden_size": 512, "num_layers": LAYERS, "num_heads": 16, "n_kv_heads": 8,
    "intermediate_size": 512, "vocab_size": 1024, "param_init_type": "float16", "compute_dtype": "float16",
    "res_dtype": "float16", "num_blocks": 64,
}  # fmt: skip
EXPERTS = {"expert_num": 4, "num_experts_chosen": 2, "routing_policy": "TopkRouterV2"}
BFLOAT16 = dict.fromkeys(("param_init_type", "compute_dtype", "res_dtype", "rotary_dtype"), "bfloat16")
CASES = {
    "joined": {"qkv_concat": True},
    "apart": {},
    "experts": {"moe_config": EXPERTS, **BFLOAT16},
}
# Of each layer, in prefill and in decode.
EVERY_LAYER = {"ReshapeAndCache": 1, "ApplyRotaryPosEmb": 1, "Swiglu": 1, "AllReduce": 2}
BY_CASE = {
    "joined": {"MatMul": 4},
    "apart": {"MatMul": 6},
    "experts": {"MatMul": 5, "GroupedMatmul": 3, "TopK": 1},
}
ATTENTION = {"prefill": "FlashAttentionScore", "decode": "PagedAttention"}
# Of reference implementations where Ascend has a kernel of its own. The router has BatchMatMul and Softmax.
REFERENCE = {"Rsqrt", "Sigmoid", "Neg", "ScatterUpdate", "TensorScatterUpdate", "ReduceMean"}


def operators(text: str) -> Counter:
    return Counter(re.findall(r"\) = (?:PrimFunc_)?([A-Za-z]+)\(", text))


@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("joined", 2),
        ("experts", 8),
        pytest.param("joined", 1, marks=pytest.mark.slow),
        pytest.param("joined", 8, marks=pytest.mark.slow),
        pytest.param("apart", 1, marks=pytest.mark.slow),
        pytest.param("apart", 2, marks=pytest.mark.slow),
        pytest.param("apart", 8, marks=pytest.mark.slow),
        pytest.param("experts", 1, marks=pytest.mark.slow),
        pytest.param("experts", 2, marks=pytest.mark.slow),
    ],
)
def test_graphs_of_any_shape_have_the_fused_kernels(case, size, tmp_path):
    rank = size - 1
    report = simulate(
        "parallel_graph:build", {"config": SIZES | CASES[case]}, device_num=size, rank=rank, folder=tmp_path
    )
    dumps = sorted((tmp_path / "ir" / f"rank_{rank}").glob("*_validate_*.ir"))
    assert len(dumps) == len(ATTENTION)
    for (phase, attention), dump in zip(ATTENTION.items(), dumps, strict=True):
        text = dump.read_text()
        found = operators(text)
        expected = {name: LAYERS * count for name, count in (EVERY_LAYER | BY_CASE[case]).items()}
        expected |= {attention: LAYERS, "RmsNorm": 2 * LAYERS + 1, "AllGather": 1}
        expected["AllReduce"] += 1  # the embedding's
        expected["MatMul"] += 1  # the output projection
        if size == 1:
            expected |= {"AllReduce": 0, "AllGather": 0}
        assert {name: found[name] for name in expected} == expected, phase
        assert not REFERENCE & found.keys(), phase
        other = next(kind for kind in ATTENTION.values() if kind != attention)
        assert found[other] == 0, phase
        assert re.search(r"batch_valid_length: <Tensor\[Int32\], \(-1, -1\)", text), phase  # of any batch
    shapes = {parameter.name: parameter.shape for parameter in report.parameters}
    heads = (64, 16, 8 // size, 32)  # num_blocks, block_size, kv heads of a rank, head_dim
    assert shapes["model.layers.0.attention.paged_attention.key_cache"] == heads
    assert shapes["model.tok_embeddings.embedding_weight"] == (1024 // size, 512)
    assert shapes["lm_head.weight"] == (1024 // size, 512)
    assert shapes["model.layers.1.attention.wo.weight"] == (512, 512 // size)
    assert {(c.kind, c.ranks or tuple(range(size))) for c in report.collectives} <= {
        ("AllReduce", tuple(range(size))),
        ("AllGather", tuple(range(size))),
    }
