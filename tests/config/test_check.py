"""The check of a plan: what it shows, what it refuses and how, and that it knows MindFormers' keys."""

import inspect
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.config.check import check
from research.telechat2.config.classes import GROUPS
from research.telechat2.config.preflight import read_settings
from research.telechat2.config.settings import DEFAULTS
from research.telechat2.config.tables import SECTIONS

COMMAND = Path(__file__).resolve().parents[2] / "research" / "telechat2" / "telechat_plan.py"
SMALL = {
    "use_parallel": True,
    "runner_config": {"batch_size": 2},
    "parallel": {"enable_parallel_optimizer": True},
    "parallel_config": {
        "data_parallel": 2, "model_parallel": 4, "pipeline_stage": 2, "micro_batch_num": 4,
        "use_seq_parallel": True,
    },
    "model": {
        "model_config": {
            "type": "TelechatConfig", "seq_length": 64, "hidden_size": 128, "num_layers": 5, "num_heads": 8,
            "n_kv_heads": 4, "intermediate_size": 96, "vocab_size": 128, "offset": [0, 1],
        },
    },
}  # fmt: skip


def changed(changes: dict) -> dict:
    """SMALL with ``{"section.key": value}`` set."""
    settings = deepcopy(SMALL)
    for dotted, value in changes.items():
        *sections, last = dotted.split(".")
        target = settings
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return settings


def model(**changes):
    return {f"model.model_config.{key}": value for key, value in changes.items()}


def plan(**changes):
    return {f"parallel_config.{key}": value for key, value in changes.items()}


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, COMMAND, *arguments], cwd=cwd, text=True, capture_output=True, timeout=120
    )


def test_a_plan_is_shown_with_devices_batch_and_stages():
    checked = check(changed({"recompute_config.recompute": [1, 3]}), 16)
    assert checked.factors == {"data_parallel": 2, "model_parallel": 4, "pipeline_stage": 2}
    assert checked.batch == {"batch_size": 2, "data_parallel": 2, "micro_batch_num": 4}
    assert (checked.device_num, checked.global_batch, checked.seq_length) == (16, 16, 64)
    assert [(stage.ranks, stage.layers, stage.recompute["recompute"]) for stage in checked.stages] == [
        ((0, 7), ((0, 2),), 1),
        ((8, 15), ((2, 5),), 3),
    ]
    assert (
        "global batch  16 = batch_size 2 x data_parallel 2 x micro_batch_num 4 sequences" in checked.table()
    )
    assert "1      8-15   3 (2-4)  3" in checked.table()


def test_virtual_chunks_are_shown_for_each_stage():
    changes = model(num_layers=9, pp_interleave_num=2, offset=[[0, 0], [0, 1]])
    changes["parallel.pipeline_config"] = {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}
    stages = check(changed(changes)).stages
    assert [stage.layers for stage in stages] == [((0, 2), (4, 6)), ((2, 4), (6, 9))]


def test_gradients_are_accumulated_without_pipeline_only():
    one_stage = plan(pipeline_stage=1, micro_batch_num=1) | model(offset=0)
    accumulating = {"runner_config.gradient_accumulation_steps": 3}
    checked = check(changed(one_stage | accumulating))
    assert checked.global_batch == 2 * 2 * 3
    with refused("gradient_accumulation_steps", 3, 1):
        check(changed(accumulating))


def test_processes_that_are_copies_take_any_number_of_devices():
    settings = changed({"parallel.parallel_mode": 0} | model(offset=0))
    checked = check(settings, 6)
    assert (checked.kind, checked.device_num, checked.global_batch) == ("data_parallel", 6, 12)
    assert "parallel_mode is 0" in checked.notes[0] and "model_parallel" in checked.notes[0]
    with refused("use_parallel", "False", 1, 8):
        check(changed({"use_parallel": False} | model(offset=0)), 8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (plan(model_parallel=3), ("num_heads 8", "parallel_config.model_parallel 3")),
        (plan(model_parallel=8), ("n_kv_heads 4", "parallel_config.model_parallel 8")),
        (model(intermediate_size=98), ("intermediate_size 98", "model_parallel 4")),
        (model(vocab_size=130), ("vocab_size 130", "model_parallel 4")),
        (model(seq_length=65), ("batch_size 2", "seq_length 65")),
        (model(hidden_size=129), ("hidden_size 129", "num_heads 8")),
        (model(hidden_size=120), ("head_dim", "hidden_size", "num_heads", 15)),
        (model(hidden_size=192), ("head_dim", 24, "FlashAttentionScore", 16)),
        (model(compute_dtype="float32"), ("compute_dtype", "float32")),
        ({"context.device_target": "CPU"}, ("compute_dtype", "bfloat16", "MindSpore")),
        (model(offset=0), ("offset", 1, "[0, 1]")),
        (model(offset=[4, -3]), ("[4, -3]",)),
        (plan(micro_batch_num=1), ("micro_batch_num", 1, "pipeline_stage 2")),
        (plan(seq_split_num=2), ("seq_split_num", 2)),
        (plan(expert_parallel=2), ("expert_parallel", 2)),
        (plan(data_parallel=0), ("parallel_config.data_parallel", 0)),
        (plan(data_parallel="2"), ("parallel_config.data_parallel", "'2'")),
        (plan(use_seq_parallel="yes"), ("use_seq_parallel", "'yes'", "True", "False")),
        ({"runner_config.batch_size": 0}, ("batch_size", 0)),
        (model(tie_word_embeddings=True), ("tie_word_embeddings", "True", "pipeline_stage 2")),
        (model(use_flash_attention=False), ("attention",)),
        (model(pp_interleave_num=2), ("offset", 1, "[[0, 1]", "[0, 0]]")),
        ({"parallel.gradients_mean": True}, ("gradients_mean", "True")),
        ({"parallel.parallel_mode": 2}, ("parallel.parallel_mode", 2, 1, 0)),
        ({"parallel.full_batch": False}, ("dataset_strategy None", "[[2, 1]", "[2, 1]]")),
        (
            {"parallel.pipeline_config": {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}},
            ("pipeline_interleave", "True"),
        ),
        (
            {"parallel.pipeline_config": {"pipeline_interleave": False, "pipeline_scheduler": "gpipe"}},
            ("pipeline_scheduler", "gpipe", "1f1b"),
        ),
        (
            {"parallel.pipeline_config": {"pipeline_interleave": False, "pipeline_scheduler": "seqpipe"}},
            ("pipeline_scheduler", "1f1b", "gpipe"),
        ),
        ({"parallel.pipeline_config": {"pipeline_interleave": True}}, ("pipeline_scheduler",)),
        ({"lr_schedule": {"warmup_steps": 5, "warmup_ratio": 0.0}}, ("warmup_steps 5", "warmup_ratio 0.0")),
        ({"micro_batch_interleave_num": 2}, ("micro_batch_interleave_num", 2, 1)),
        (model(use_ring_attention=True), ("'use_ring_attention'",)),
        ({"recompute_config.recompute": [1]}, ("recompute_config.recompute", "[1]", 2)),
        ({"recompute_config.recompute": [3, 0]}, ("recompute_config.recompute", 3, 2)),
        (model(compute_dtype="float64"), ("compute_dtype", "'float64'")),
        (model(num_layer=5), ("num_layer", "'num_layers'")),
        (model(out_proj_has_bias=False), ("out_proj_has_bias",)),
    ],
)  # fmt: skip
def test_an_illegal_plan_is_refused_by_a_sentence_with_its_values(changes, sentence):
    with refused(*sentence):
        check(changed(changes))


def test_the_number_of_devices_must_be_the_plans():
    with refused(16, 32):
        check(SMALL, 32)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (plan(vocab_emb_dp=True), "vocab_emb_dp True"),
        (plan(gradient_aggregation_group=4), "gradient_aggregation_group"),
        (plan(pipeline_stage=1) | model(offset=0), "micro_batch_num 4"),
        (plan(context_parallel_algo="ulysses_cp"), "context_parallel_algo"),
        ({"recompute_config.recompute_slice_activation": True}, "recompute_slice_activation"),
        (
            {"parallel": {"parallel_optimizer_config": {"parallel_optimizer_threshold": 0}}},
            "parallel_optimizer_config",
        ),
        ({"layer_decay": 0.65}, "layer_decay"),
    ],
)
def test_a_setting_without_effect_is_noted(changes, note):
    notes = check(changed(changes)).notes
    assert len(notes) == 1 and note in notes[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("parallel_config.model_paralel", ("parallel_config.model_paralel", "model_parallel")),
        ("runner_config.batchsize", ("runner_config.batchsize", "batch_size")),
        ("parallel.paralel_mode", ("parallel.paralel_mode", "parallel_mode")),
        (
            "parallel.parallel_optimizer_config.threshold",
            ("parallel_optimizer_config.threshold",),
        ),
        ("lr_schedule.warmup_step", ("lr_schedule.warmup_step", "warmup_steps")),
        ("runner_wrapper.clip_grad", ("runner_wrapper.clip_grad", "use_clip_grad")),
        ("context.devices", ("context.devices",)),
    ],
)
def test_a_key_that_nothing_reads_is_refused(change, sentence):
    with refused(*sentence):
        read_settings("finetune_telechat_7b", {change: 1}, Path.cwd())


def test_the_tables_of_keys_are_those_of_mindformers_and_mindspore():
    from mindformers.core.lr.lr_schedule import CosineWithWarmUpLR
    from mindformers.tools.register import template
    from mindformers.wrapper.wrapper import MFTrainOneStepCell
    from mindspore.parallel._auto_parallel_context import _set_auto_parallel_context_func_map

    for section, defaults in DEFAULTS.items():
        theirs = template.CONFIG_NAME_TO_CLASS[section]
        assert defaults == {key: getattr(theirs, key) for key in theirs.keys()}  # noqa: SIM118 no dictionary
    assert set(SECTIONS["parallel"]) == set(_set_auto_parallel_context_func_map)
    schedule = set(inspect.signature(CosineWithWarmUpLR.__init__).parameters) - {"self", "kwargs"}
    # warmup_epochs is the Trainer's
    assert set(GROUPS["lr_schedule"]["CosineWithWarmUpLR"]) == schedule | {"warmup_epochs"}
    step = set(inspect.signature(MFTrainOneStepCell.__init__).parameters)
    assert set(GROUPS["runner_wrapper"]["MFTrainOneStepCell"]) < step


def test_the_command_prints_a_table_and_writes_json_once(tmp_path):
    arguments = ("--config", "finetune_telechat_35b", "--json", "plan.json")
    first = command(*arguments, "--set", "parallel_config.micro_batch_num=16", "seed=1", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    assert "1      4-7    17 (15-31)" in first.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["check"]["global_batch"] == 16
    assert written["check"]["stages"][1] == {
        "ranks": [4, 7],
        "layers": [[15, 32]],
        "recompute": {"recompute": 17, "select_recompute": 0, "select_comm_recompute": 0},
    }
    second = command(*arguments, cwd=tmp_path)
    assert second.returncode == 1 and "plan.json exists and is not overwritten" in second.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_command_ends_with_one_sentence_for_an_illegal_plan():
    ended = command("--config", "finetune_telechat_35b", "--device_num", "32")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1
    assert command("--config", "finetune_telechat_35b", "--set", "seed").returncode == 2


def test_plans_are_checked_without_mindspore():
    code = (
        "import sys; from research.telechat2.plan.command import plan; "
        "plan('finetune_telechat_115b', {}); plan('finetune_telechat_39b_a12b', {}); "
        "sys.exit(any(name.startswith('mind') or name == 'torch' for name in sys.modules))"
    )
    checkout = str(COMMAND.parents[2])
    ended = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": checkout}, timeout=60)
    assert ended.returncode == 0
