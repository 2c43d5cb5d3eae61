"""What is estimated is what MindSpore compiles: each parameter's bytes, and each kind of collective's."""

from collections import Counter
from pathlib import Path

import pytest
from random_plans import random_plan

from research.telechat2.config.check import check
from research.telechat2.config.preflight import read_settings
from research.telechat2.plan.dry_run.simulate import simulate
from research.telechat2.plan.estimate.communication import stage_communication
from research.telechat2.plan.estimate.estimate import throughput
from research.telechat2.plan.estimate.memory import stage_memory, stage_parameters
from research.telechat2.plan.estimate.workload import workload

MODEL, PLAN, AGAIN = "model.model_config.", "parallel_config.", "recompute_config."
OPTIMIZER = "parallel.parallel_optimizer_config."
SMALL = {
    MODEL + "num_layers": 2, MODEL + "hidden_size": 256, MODEL + "num_heads": 8, MODEL + "n_kv_heads": 4,
    MODEL + "intermediate_size": 512, MODEL + "vocab_size": 1024, MODEL + "seq_length": 256,
    AGAIN + "recompute": False, PLAN + "data_parallel": 2, PLAN + "model_parallel": 4,
}  # fmt: skip
MIXTURE = {
    "expert_num": 8, "num_experts_chosen": 2, "capacity_factor": 1.5, "aux_loss_types": ["expert"],
    "aux_loss_factors": [0.01],
}  # fmt: skip
PIPELINE = {
    MODEL + "num_layers": 5, MODEL + "offset": [0, 1], PLAN + "pipeline_stage": 2,
    PLAN + "micro_batch_num": 3, AGAIN + "recompute": [1, 0], AGAIN + "select_recompute": [2, 2],
    OPTIMIZER + "parallel_optimizer_threshold": 600,
}  # fmt: skip
EXPERTS = {
    "moe_config": MIXTURE, PLAN + "expert_parallel": 2, PLAN + "data_parallel": 4,
    PLAN + "model_parallel": 2,
    OPTIMIZER + "optimizer_weight_shard_size": 2, "calculate_per_token_loss": False,
}  # fmt: skip
UNSHARED = {
    PLAN + "use_seq_parallel": False, "parallel.enable_parallel_optimizer": False,
    AGAIN + "recompute": True,
}  # fmt: skip
SLOW = {
    "whole vocabulary, gathers again": {PLAN + "vocab_emb_dp": True, AGAIN + "select_comm_recompute": True},
    "odd sizes": {
        MODEL + "vocab_size": 1028, PLAN + "data_parallel": 8, PLAN + "model_parallel": 1,
        OPTIMIZER + "parallel_optimizer_threshold": 0,
    },
    "interleaved copies": {MODEL + "fine_grain_interleave": 2, AGAIN + "recompute": [1]},
    "level 3": {
        "parallel.parallel_optimizer_config": {
            "optimizer_level": "level3", "parallel_optimizer_threshold": 64,
        },
    },
    "gathered keys": {
        PLAN + "context_parallel": 2, PLAN + "data_parallel": 1, AGAIN + "recompute": [1],
    },
    "exchanged heads": {
        PLAN + "context_parallel": 2, PLAN + "data_parallel": 2, PLAN + "model_parallel": 2,
        PLAN + "context_parallel_algo": "ulysses_cp", "parallel.enable_alltoall": True,
        AGAIN + "recompute": [1],
    },
    "exchanged heads and gathered keys": {
        PLAN + "context_parallel": 4, PLAN + "data_parallel": 1, PLAN + "model_parallel": 2,
        PLAN + "context_parallel_algo": "hybrid_cp", PLAN + "ulysses_degree_in_cp": 2,
        PLAN + "use_seq_parallel": False, "parallel.enable_alltoall": True,
    },
    "accumulation": {"runner_config.gradient_accumulation_steps": 2},
    "16-bit weights": {MODEL + "param_init_type": "bfloat16"},
    "split experts": EXPERTS | {"moe_config": MIXTURE | {"ep_extend_tp": False}, AGAIN + "recompute": True},
    "split experts without sequence parallelism": EXPERTS
    | {"moe_config": MIXTURE | {"ep_extend_tp": False}, PLAN + "use_seq_parallel": False},
    "chunks": {
        MODEL + "num_layers": 4, MODEL + "pp_interleave_num": 2, PLAN + "pipeline_stage": 2,
        PLAN + "micro_batch_num": 4,
        "parallel.pipeline_config": {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"},
    },
}  # fmt: skip


def settings_of(changes: dict) -> dict:
    mixture = changes.get("moe_config")
    changes = SMALL | {key: value for key, value in changes.items() if key != "moe_config"}
    _, settings = read_settings("finetune_telechat_7b", changes, Path.cwd())
    return settings | ({"moe_config": mixture} if mixture else {})


def compare(settings: dict, stage: int):
    """Assert that estimate and compiled graph of the stage's first rank agree."""
    run = workload(settings)
    rank = stage * run.stage_devices
    target = "research.telechat2.run.training_step:build"
    report = simulate(target, {"settings": settings}, device_num=run.devices, rank=rank)
    stored = {parameter.name: parameter.bytes for parameter in report.parameters}
    own = ("adam_m.", "adam_v.", "accu_grads.")
    weights = {name: size for name, size in stored.items() if name.startswith(("model.", "lm_head."))}
    assert {parameter.name: parameter.bytes for parameter in stage_parameters(run, stage)} == weights
    memory = stage_memory(run, stage, throughput(run).schedule)
    assert memory.parameters == sum(weights.values())
    moments = [size for name, size in stored.items() if name.startswith(own[:2])]
    assert memory.optimizer == sum(moments)
    accumulated = [size for name, size in stored.items() if name.startswith(own[2])]
    trained = [size for name, size in weights.items() if f"adam_m.{name}" in stored]
    assert memory.gradients == sum(accumulated or trained)
    _compare_communication(run, stage, report)


def _compare_communication(run, stage: int, report):
    """Of each kind the bytes of the tensors; those of a few numbers for each token are not estimated."""
    found, expected = Counter(), Counter()
    for item in report.collectives:
        if item.kind != "Receive" and len(item.ranks) > 1:
            tensor = item.output if item.kind == "AllGather" else item.input
            found[item.kind] += tensor.bytes * item.count
    for item in stage_communication(run, stage):
        expected[item.kind] += item.tensor_bytes * item.count
    negligible = 0.005 * sum(found.values())
    for kind in found | expected:
        assert abs(found[kind] - expected[kind]) <= max(0.05 * found[kind], negligible), (found, expected)
    assert sum(expected.values()) == pytest.approx(sum(found.values()), rel=0.05)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_pipeline_with_recomputation_is_estimated_as_compiled(stage):
    compare(settings_of(PIPELINE), stage)


def test_experts_are_estimated_as_compiled():
    compare(settings_of(EXPERTS), 0)


@pytest.mark.slow  # compiles as long as the two before
def test_a_plan_without_sequence_and_optimizer_parallelism_is_estimated_as_compiled():
    compare(settings_of(UNSHARED), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_further_plans_are_estimated_as_compiled(name):
    settings = settings_of(SLOW[name])
    for stage in range(settings["parallel_config"]["pipeline_stage"]):
        compare(settings, stage)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_plans_are_estimated_as_compiled(seed):
    settings = random_plan(seed) | {"calculate_per_token_loss": False}
    # Their tokens have so few channels that the loss's numbers for each token would count.
    settings["model"]["model_config"]["hidden_size"] *= 16
    try:
        if check(settings).device_num == 1:
            pytest.skip("one device has no plan")
        throughput(workload(settings))
    except ValueError as error:
        pytest.skip(f"not legal, or not estimated: {error}")
    compare(settings, settings["parallel_config"]["pipeline_stage"] - 1)
