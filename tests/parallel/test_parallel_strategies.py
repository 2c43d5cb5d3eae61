"""What a tensor-parallel layer communicates and in which dtypes it computes, read from the compiled graph."""

from collections import Counter
from types import SimpleNamespace

import mindspore as ms
import pytest
from parallel_cells import MODEL, PLAN, compiled
from refusal import refused

from research.telechat2.parallel.strategies import apply_plan
from research.telechat2.plan.dry_run.graph import TensorType
from research.telechat2.telechat_config import TelechatConfig

DP, MP, SEQ, HIDDEN, WIDTH, VOCAB = 2, 4, 256, 256, 512, 1024  # as in MODEL and PLAN
SHARDED = {
    "enable_parallel_optimizer": True,
    "parallel_optimizer_config": {"parallel_optimizer_threshold": 0},
}


@pytest.fixture(scope="module")
def sequence_parallel():
    return compiled(parallel=SHARDED)


def of_layer(report, layer=1):
    """How often a layer communicates what, but for gradients and weights."""
    return Counter(
        (c.phase, c.kind, c.input, c.ranks)
        for c in report.collectives
        if f"layers.{layer}." in c.scope and c.role not in ("gradient", "weight")
        for _ in range(c.count)
    )


def test_a_layer_with_sequence_parallelism_gathers_and_scatters_twice_each_way(sequence_parallel):
    whole, part = TensorType("BFloat16", (SEQ, HIDDEN)), TensorType("BFloat16", (SEQ // MP, HIDDEN))
    ranks = (0, 1, 2, 3)
    assert of_layer(sequence_parallel) == {
        ("forward", "AllGather", part, ranks): 2,
        ("forward", "ReduceScatter", whole, ranks): 2,
        ("backward", "AllGather", part, ranks): 2,
        ("backward", "ReduceScatter", whole, ranks): 2,
    }
    assert of_layer(sequence_parallel, 0) == of_layer(sequence_parallel, 1)


def test_without_it_a_layer_adds_up_twice_each_way():
    report = compiled({"use_seq_parallel": False}, num_layers=1)
    whole = TensorType("BFloat16", (SEQ, HIDDEN))
    assert of_layer(report, 0) == {
        ("forward", "AllReduce", whole, (0, 1, 2, 3)): 2,
        ("backward", "AllReduce", whole, (0, 1, 2, 3)): 2,
    }


def test_around_the_layers_embedding_and_output_communicate_once_each_way(sequence_parallel):
    """All that is as large as an activation; the loss adds up numbers for each token besides."""
    whole, part = (SEQ, HIDDEN), (SEQ // MP, HIDDEN)
    found = Counter(
        (c.phase, c.kind, c.input)
        for c in sequence_parallel.collectives
        if "layers." not in c.scope and c.role not in ("weight", "gradient") and c.input.bytes > 4 * SEQ * DP
    )
    assert found == {
        ("forward", "ReduceScatter", TensorType("Float32", whole)): 1,
        ("forward", "AllGather", TensorType("BFloat16", part)): 1,
        ("backward", "ReduceScatter", TensorType("BFloat16", whole)): 1,
        ("backward", "AllGather", TensorType("Float32", part)): 1,
    }


def test_dtypes_are_those_of_the_config(sequence_parallel):
    def dtypes(kind, scope=""):
        return {
            t.dtype
            for o in sequence_parallel.operators
            if o.kind == kind and o.phase == "forward" and o.scope.endswith(scope)
            for t in (*o.inputs, *o.outputs)
        }

    layer = [o for o in sequence_parallel.operators if o.scope.endswith("model.layers.1")]
    sums = [o for o in layer if o.kind == "Add" and o.phase == "forward"]
    part = TensorType("Float32", (SEQ // MP, HIDDEN))
    assert [(o.inputs, o.outputs) for o in sums] == [((part, part), (part,))] * 2
    assert dtypes("RmsNorm") == {"Float32"}
    assert dtypes("MatMul") == {"BFloat16"}
    flash = [o for o in sequence_parallel.operators if o.kind == "FlashAttentionScore"]
    assert len(flash) == 2
    for operator in flash:
        assert {t.dtype for t in operator.inputs if len(t.shape) == 4} == {"BFloat16"}
    # The softmax's maximum and sum of each row, eight times each, as they come back for the gradient.
    statistics = TensorType("Float32", (1, MODEL["num_heads"] // MP, SEQ, 8))
    for operator in sequence_parallel.operators:
        if operator.kind == "FlashAttentionScoreGrad":
            assert operator.inputs.count(statistics) == 2


def test_weights_are_split_and_shared_out_between_optimizers(sequence_parallel):
    found = {p.name: p for p in sequence_parallel.parameters}
    rows = {  # of the slice that a rank computes with; half of them are its own
        "model.tok_embeddings.embedding_weight": (VOCAB // MP, HIDDEN),
        "model.layers.0.attention.wq.weight": (HIDDEN // MP, HIDDEN),
        "model.layers.0.attention.wk_v.weight": (HIDDEN // MP, HIDDEN),
        "model.layers.0.attention.wo.weight": (HIDDEN, HIDDEN // MP),
        "model.layers.0.feed_forward.w1.weight": (WIDTH // MP, HIDDEN),
        "model.layers.0.feed_forward.w3.weight": (WIDTH // MP, HIDDEN),
        "model.layers.0.feed_forward.w2.weight": (HIDDEN, WIDTH // MP),
        "lm_head.weight": (VOCAB // MP, HIDDEN),
    }
    for name, shape in rows.items():
        assert found[name].slice_shape == shape
        assert found[name].local_shape == (shape[0] // DP, shape[1])
    for name in ("attention_norm.weight", "ffn_norm.weight", "attention.wo.bias", "feed_forward.w2.bias"):
        whole = found[f"model.layers.0.{name}"]
        assert whole.local_shape == (HIDDEN,) and not whole.optimizer_shard


def test_a_replicated_vocabulary_is_computed_on_each_devices_own_tokens():
    report = compiled({"vocab_emb_dp": True}, num_layers=1)
    found = {p.name: p.slice_shape for p in report.parameters}
    assert found["lm_head.weight"] == found["model.tok_embeddings.embedding_weight"] == (VOCAB, HIDDEN)
    head = [o for o in report.operators if o.kind == "MatMul" and o.scope.endswith("lm_head")]
    assert head[0].outputs[0].shape == (SEQ // MP, VOCAB)
    assert not [
        c
        for c in report.collectives
        if not c.parameter and "layers." not in c.scope and c.input.bytes > 4 * SEQ * DP
    ]


def test_two_micro_batches_communicate_twice_as_much_as_one():
    """Under the Trainer's wrappers; a packed record's mask is made from each device's own tokens."""
    model = {"document_start_ids": [5], "calculate_per_token_loss": True, "num_layers": 1}
    report = compiled({"model_parallel": 2}, steps={"accumulation": 2}, **model)
    whole, part = TensorType("BFloat16", (SEQ, HIDDEN)), TensorType("BFloat16", (SEQ // 2, HIDDEN))
    assert of_layer(report, 0) == {
        ("forward", "AllGather", part, (0, 1)): 4,
        ("forward", "ReduceScatter", whole, (0, 1)): 4,
        ("backward", "AllGather", part, (0, 1)): 4,
        ("backward", "ReduceScatter", whole, (0, 1)): 4,
    }
    assert not [c for c in report.collectives if "documents" in c.scope]
    if model:  # a record's documents are told apart by where they end, not by a mask
        queries, keys = (SEQ, MODEL["num_heads"] // 2, 32), (SEQ, MODEL["n_kv_heads"] // 2, 32)
        kernels = [o for o in report.operators if o.kind == "FlashAttentionScore"]
        assert {tuple(t.shape for t in o.inputs) for o in kernels} == {(queries, keys, keys, (2048, 2048))}


@pytest.mark.parametrize(
    ("fields", "mean", "values"),
    [
        ({}, False, ("pipeline_stage 1", 8, "16 devices")),
        ({"parallel_config": PLAN | {"data_parallel": 4}}, True, ("gradients_mean", True, False)),
        (
            {"parallel_config": PLAN | {"data_parallel": 4}, "use_flash_attention": False},
            False,
            ("use_flash_attention", False),
        ),
    ],
)
def test_a_context_that_does_not_fit_the_plan_is_refused(monkeypatch, fields, mean, values):
    context = {"parallel_mode": "semi_auto_parallel", "gradients_mean": mean}
    monkeypatch.setattr(ms, "get_auto_parallel_context", context.__getitem__)
    monkeypatch.setattr(ms.communication, "get_group_size", lambda: 16)
    model = SimpleNamespace(model=SimpleNamespace(layers=[None]))
    config = TelechatConfig(**MODEL | {"num_layers": 1, "parallel_config": PLAN} | fields)
    with refused(*values):
        apply_plan(model, config)
