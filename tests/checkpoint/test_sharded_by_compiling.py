"""Slices as a compiled training step stores them, merged by the strategies of the same dry run.

What a rank stores is taken from the compiled graph: local shapes, and the ranks that gather a weight.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sharding import COUNTERS, assert_same, cut, stored_by, write_shards

from research.telechat2.checkpoint.cluster.reshard import transform
from research.telechat2.plan.dry_run.simulate import STRATEGY, simulate

MODEL = {
    "seq_length": 32, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96,
    "vocab_size": 128,
}  # fmt: skip
EXPERTS = {
    "expert_num": 16, "num_experts_chosen": 4, "capacity_factor": 1.2, "aux_loss_types": ["expert"],
    "aux_loss_factors": [0.01], "routing_policy": "TopkRouterV2",
}  # fmt: skip
MODELS = {
    "dense": {"n_kv_heads": 2},
    "experts": {"moe_config": EXPERTS | {"ep_extend_tp": True}},
    "widths": {"moe_config": EXPERTS | {"ep_extend_tp": False}},
}
SIXTEEN = {"data_parallel": 4, "model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 4}
EIGHT = {"data_parallel": 4, "model_parallel": 2}


def dry_run(folder: Path, model: str, plan: dict, expert_parallel: int) -> list:
    """Reports of each stage's first rank; ``folder/strategy`` has their strategies."""
    (folder / "strategy").mkdir(parents=True)
    stages = plan.get("pipeline_stage", 1)
    devices = plan["data_parallel"] * plan["model_parallel"] * stages
    parallel_config = plan | {"use_seq_parallel": True, "vocab_emb_dp": False}
    if model != "dense":
        parallel_config["expert_parallel"] = expert_parallel
    arguments = {"config": MODEL | MODELS[model] | {"parallel_config": parallel_config}}
    parallel = {
        "pipeline_stages": stages, "enable_parallel_optimizer": True,
        "parallel_optimizer_config": {"parallel_optimizer_threshold": 0},
    }  # fmt: skip
    reports = []
    for rank in range(0, devices, devices // stages):
        reports.append(
            simulate("parallel_cells:build", arguments, device_num=devices, rank=rank, parallel=parallel,
                     folder=folder / f"rank_{rank}")
        )  # fmt: skip
        (folder / f"rank_{rank}" / STRATEGY).rename(folder / f"strategy/ckpt_strategy_rank_{rank}.ckpt")
    return reports


def layouts_of(report, stage_size: int) -> dict:
    """Name -> what sharding.cut takes; the optimizer's groups are those that gather in the graph."""
    gathers = {c.group: c.ranks for c in report.collectives if (c.role, c.kind) == ("weight", "AllGather")}
    layouts = {}
    for parameter in report.parameters:
        if not parameter.device_matrix or parameter.name.startswith("accu_grads."):
            continue
        axes = tuple(() if axis == -1 else (axis,) for axis in parameter.tensor_map)
        parts = parameter.slice_shape[0] // parameter.local_shape[0]
        layout = (parameter.device_matrix, axes, parts if parts > 1 else 0)
        layouts[parameter.name] = layout
        numbers = np.arange(parameter.shape[0] * int(np.prod(parameter.shape[1:])), dtype=np.float32)
        whole = numbers.reshape(parameter.shape)
        own = report.rank % stage_size
        assert cut(whole, layout, own).shape == parameter.local_shape, parameter
        if parts > 1:
            ranks = [rank % stage_size for rank in gathers[parameter.optimizer_shard]]
            gathered = np.concatenate([cut(whole, layout, rank) for rank in ranks])
            np.testing.assert_array_equal(gathered, cut(whole, (*layout[:2], 0), own))
    assert gathers, "the optimizer shares out nothing"
    return layouts


def tensors_of(reports: list) -> dict:
    rng = np.random.default_rng(5)
    parameters = {p.name: p for report in reports for p in report.parameters if p.device_matrix}
    return {
        name: rng.standard_normal(p.shape).astype(np.float32)
        for name, p in parameters.items()
        if not name.startswith("accu_grads.")
    }


def compile_and_save(folder: Path, model: str) -> tuple[dict, list[dict]]:
    """A checkpoint of sixteen devices in ``folder/checkpoint``; its tensors, and the stages' layouts."""
    reports = dry_run(folder, model, SIXTEEN, expert_parallel=2)
    whole, stages = tensors_of(reports), [layouts_of(report, 8) for report in reports]
    assert len(whole) > 60
    write_shards(folder / "checkpoint", whole, stages)
    return whole, stages


def test_experts_of_sixteen_devices_are_merged(tmp_path):
    whole, _ = compile_and_save(tmp_path, "experts")
    transform(tmp_path / "checkpoint", tmp_path / "one", "x", tmp_path / "strategy")
    assert_same(load_file(tmp_path / "one/rank_0/x0.safetensors"), whole | COUNTERS)


@pytest.mark.slow  # three compilations each
@pytest.mark.parametrize("model", MODELS)
def test_sixteen_devices_to_eight_and_back_and_as_mindformers_does(tmp_path, model):
    whole, stages = compile_and_save(tmp_path, model)
    eight = dry_run(tmp_path / "eight", model, EIGHT, expert_parallel=4 if model == "experts" else 2)
    few = [layouts_of(eight[0], 8)]
    sixteen_strategy, eight_strategy = tmp_path / "strategy", tmp_path / "eight/strategy"
    transform(tmp_path / "checkpoint", tmp_path / "few", "x", sixteen_strategy, eight_strategy)
    for rank in range(8):
        expected = stored_by(whole, few, rank)
        assert_same(load_file(tmp_path / f"few/rank_{rank}/x{rank}.safetensors"), expected)
    transform(tmp_path / "few", tmp_path / "back", "x", eight_strategy, sixteen_strategy)
    for rank in range(16):
        expected = stored_by(whole, stages, rank)
        assert_same(load_file(tmp_path / f"back/rank_{rank}/x{rank}.safetensors"), expected)

    arguments = f"--src_ckpt_strategy {sixteen_strategy} --src_ckpt_dir {tmp_path}/checkpoint "
    arguments += f"--dst_ckpt_dir {tmp_path}/theirs --prefix x"
    command = [sys.executable, "-m", "mindformers.tools.transform_ckpt", *arguments.split()]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=300)
    import mindspore

    theirs = mindspore.load_checkpoint(str(tmp_path / "theirs/rank_0/x0.ckpt"))
    assert_same({name: value.asnumpy() for name, value in theirs.items()}, whole | COUNTERS)
