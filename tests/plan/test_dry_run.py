"""The dry run compiles every shipped YAML's training step, and agrees with the check on what is legal."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from random_plans import random_plan
from refusal import refused

from research.telechat2.common.errors import UsageError
from research.telechat2.config.check import check
from research.telechat2.config.preflight import read_settings
from research.telechat2.config.yaml_files import read_config, shipped_configs
from research.telechat2.plan.dry_run.report import dry_run
from research.telechat2.plan.dry_run.simulate import CompilationError, simulate

COMMAND = Path(__file__).resolve().parents[2] / "research" / "telechat2" / "telechat_plan.py"
PLANS = [path for path in shipped_configs() if path.name.startswith("finetune")]
CLUSTER = [path.name for path in PLANS if read_config(path).get("use_parallel")]
# Refusals of the check alone: MindSpore compiles what they describe, but a run would not do what it should.
DELIBERATE = {
    "gradients would be divided twice": "gradients_mean is True",
    "one chunk cannot be interleaved": "pp_interleave_num is 1, but parallel.pipeline_config",
    "gradients of copies would be summed": "micro_batch_interleave_num is 2",
    "sequences have no pipeline": "pipeline_scheduler is seq",
    "a model without experts has none to place": "but the model has no experts; set it to 1",
    "chunks without a pipeline would be one": "virtual chunks need a pipeline",
    "experts without capacity would compute with a part of their width": "experts without capacity lie whole",
}


def scaled(name: str) -> dict:
    """Changes that leave a YAML its parallel dimensions, and a small model."""
    _, settings = read_settings(name, {}, Path.cwd())
    plan, model = settings["parallel_config"], settings["model"]["model_config"]
    mp, stages, chunks = plan["model_parallel"], plan["pipeline_stage"], model.get("pp_interleave_num", 1)
    heads = 2 * mp
    changes = {
        "model.model_config.num_layers": max(stages * chunks, 2),
        "model.model_config.offset": 0,
        "model.model_config.num_heads": heads,
        "model.model_config.n_kv_heads": mp if model.get("n_kv_heads") else heads,
        "model.model_config.hidden_size": 16 * heads,
        "model.model_config.intermediate_size": 32 * mp,
        "model.model_config.vocab_size": 64 * mp,
        "model.model_config.seq_length": 16 * mp,
    }
    if stages > 1:
        changes["parallel_config.micro_batch_num"] = stages
    for choice, value in settings.get("recompute_config", {}).items():
        if isinstance(value, list):
            changes[f"recompute_config.{choice}"] = [min(n, chunks) for n in value]
    return changes


def compiled(name: str, rank: int | None = None, **options):
    _, settings = read_settings(name, scaled(name), Path.cwd())
    return settings["model"]["model_config"], list(dry_run(settings, rank=rank, **options))


def layer_bytes(model: dict, mp: int, dp: int = 1) -> int:
    """Bytes of a dense layer's weights on a device, float32: matrices in ``mp * dp`` parts, vectors whole."""
    hidden, width = model["hidden_size"], model["intermediate_size"]
    keys = hidden * model["n_kv_heads"] // model["num_heads"]
    matrices = hidden * (2 * hidden + 2 * keys + 3 * width)
    return 4 * (matrices // (mp * dp) + 4 * hidden)


def test_the_command_compiles_one_rank_and_writes_its_strategies(tmp_path):
    """35B: four stages, each split over four devices, without data parallelism."""
    changes = [f"{key}={value}" for key, value in scaled("finetune_telechat_35b.yaml").items()]
    arguments = [
        "--config", "finetune_telechat_35b", "--set", *changes, "--dry_run", "--rank", "13",
        "--output_dir", "out", "--json", "plan.json",
    ]  # fmt: skip
    command = [sys.executable, COMMAND, *arguments]
    ended = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "stage 3: rank 13, compiled in" in ended.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"out", "plan.json"}
    strategies = tmp_path / "out" / "strategy" / "ckpt_strategy_rank_13.ckpt"
    assert strategies.stat().st_size > 0
    (stage,) = json.loads((tmp_path / "plan.json").read_text())["dry_run"]
    assert stage["strategy_file"] == str(strategies)
    model = read_settings("finetune_telechat_35b", scaled("finetune_telechat_35b.yaml"), tmp_path)[1]["model"]
    hidden, vocab = (model["model_config"][key] for key in ("hidden_size", "vocab_size"))
    weights = layer_bytes(model["model_config"], 4) + 4 * (vocab * hidden // 4 + hidden)
    assert stage["bytes"]["weights"] == stage["bytes"]["gradients"] == weights
    assert stage["bytes"]["optimizer"] == 2 * weights
    received = [row for row in stage["traffic"] if row["kind"] == "Receive"]
    assert [(row["phase"], row["count"]) for row in received] == [("forward", 4)]
    products = {row["inputs"] for row in stage["computations"] if row["kind"] == "MatMul"}
    assert products == {"BFloat16"}
    again = subprocess.run(command[:-2], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert (
        again.returncode == 1 and "exists and is not overwritten; give another --output_dir" in again.stderr
    )


@pytest.mark.slow  # compiles for a minute
def test_a_middle_stage_of_115b_has_its_three_runs_of_layers_and_no_embedding():
    model, (stage,) = compiled("finetune_telechat_115b.yaml", rank=3 * 64 + 5)
    assert stage.stage == 3
    # Matrices are above the threshold of 64 KB, so that the eight data-parallel ranks have a part each.
    assert stage.bytes["weights"] == 3 * layer_bytes(model, 8, 8)
    sent = {(row.phase, row.kind): row.count for row in stage.traffic if row.role == "pipeline"}
    # Each of eight micro-batches comes and goes three times in either direction.
    assert sent == {(phase, kind): 24 for phase in ("forward", "backward") for kind in ("Send", "Receive")}


def test_39b_exchanges_rows_of_experts_between_eight_devices():
    _, (stage,) = compiled("finetune_telechat_39b_a12b.yaml", rank=512)
    exchanges = [row for row in stage.traffic if row.kind == "AlltoAll"]
    assert {(row.group_size, row.dtype) for row in exchanges} == {(8, "BFloat16")}
    # One layer, two micro-batches, there and back.
    assert {row.phase: row.count for row in exchanges} == {"forward": 4, "backward": 4}


def evaluation(name: str, place: str, in_training: bool):
    """The compiled evaluation of a YAML, scaled down, for the first or the last stage of its pipeline."""
    _, settings = read_settings(name, scaled(name), Path.cwd())
    checked = check(settings)
    return simulate(
        "evaluation_step:build",
        {"settings": settings, "in_training": in_training},
        device_num=checked.device_num,
        rank=checked.stages[{"first": 0, "last": -1}[place]].ranks[0],
    )


def test_39b_evaluates_with_experts_behind_a_pipeline_and_sequence_parallelism():
    """In training it has a capacity, in evaluation none: rows go to their experts, however many there are."""
    report = evaluation("finetune_telechat_39b_a12b.yaml", "last", in_training=False)
    assert sum(found.kind == "AlltoAllV" for found in report.collectives) == 2
    assert {found.phase for found in report.operators} == {"forward"}
    assert not any("adam" in parameter.name for parameter in report.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", CLUSTER)
def test_every_plan_evaluates(name, place, in_training):
    _, settings = read_settings(name, {}, Path.cwd())
    chunks = settings["model"]["model_config"].get("pp_interleave_num", 1)
    if in_training and chunks > 1:
        with refused(f"pp_interleave_num {chunks}", kind=CompilationError):
            evaluation(name, place, in_training)
        return
    report = evaluation(name, place, in_training)
    assert report.parameters and {found.phase for found in report.operators} == {"forward"}


def test_what_is_not_one_graph_for_a_cluster_is_refused(tmp_path):
    _, settings = read_settings("finetune_telechat_tiny", {}, tmp_path)
    with refused("one device", "use_parallel: True", "parallel.parallel_mode: 1"):
        next(dry_run(settings))
    _, settings = read_settings("finetune_telechat_7b", {}, tmp_path)
    with refused("--rank is 8", "0 to 7"):
        next(dry_run(settings, rank=8))
    with refused("is 8", "16 devices"):
        next(dry_run(settings, 16))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", CLUSTER)
def test_every_plan_compiles_at_small_widths(name, place):
    _compiles(name, scaled(name), place)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", CLUSTER)
def test_every_plan_compiles_at_full_size(name, place):
    _compiles(name, {}, place)


def _compiles(name: str, changes: dict, place: str) -> None:
    _, settings = read_settings(name, changes, Path.cwd())
    checked = check(settings)
    stage = {"first": 0, "middle": len(checked.stages) // 2, "last": len(checked.stages) - 1}[place]
    if place != "first" and stage == 0 or place == "middle" and len(checked.stages) < 3:
        pytest.skip("the pipeline has no such stage")
    (found,) = dry_run(settings, rank=checked.stages[stage].ranks[0])
    print(f"{name} {place}: {found.seconds} {found.peak_bytes / 1e9:.2f} GB")
    assert found.bytes["optimizer"] == 2 * found.bytes["weights"] > 0


# Legal and illegal ones, of each kind of plan; the others are in the slow tier.
FIXED = tuple(range(6))


@pytest.mark.parametrize("seed", FIXED)
def test_check_and_compiler_agree(seed):
    _agree(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [seed for seed in range(200) if seed not in FIXED])
def test_check_and_compiler_agree_on_more_plans(seed):
    _agree(seed)


def test_a_third_of_the_random_plans_are_legal():
    legal = sum(_refusal(random_plan(seed)) is None for seed in range(200))
    assert 67 <= legal <= 150


def _refusal(settings: dict) -> str | None:
    try:
        check(settings)
    except UsageError as error:
        return str(error)
    return None


def _agree(seed: int) -> None:
    """MindSpore, without this project's rules, refuses exactly the plans that the check refuses."""
    settings = random_plan(seed)
    refused = _refusal(settings)
    plan = settings["parallel_config"]
    devices = prod(plan[name] for name in ("data_parallel", "model_parallel", "pipeline_stage"))
    try:
        simulate("unchecked_step:build", {"settings": settings}, device_num=devices, rank=devices - 1)
    except CompilationError as error:
        assert refused, f"the check allows what MindSpore refuses: {error}"
        return
    deliberate = [rule for rule, words in DELIBERATE.items() if refused and words in refused]
    assert not refused or deliberate, f"the check refuses what MindSpore allows: {refused}"
