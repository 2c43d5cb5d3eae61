"""The check of a plan: what it shows, what it refuses and how, and that it knows MindFormers' keys."""

import inspect
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

from research.telechat2.config.check import check
from research.telechat2.config.classes import GROUPS
from research.telechat2.config.model_fields import model_defaults
from research.telechat2.config.settings import DEFAULTS, read_settings
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
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps is 3, .* in a pipeline; set it to 1"):
        check(changed(accumulating))


def test_processes_that_are_copies_take_any_number_of_devices():
    settings = changed({"parallel.parallel_mode": 0} | model(offset=0))
    checked = check(settings, 6)
    assert (checked.kind, checked.device_num, checked.global_batch) == ("data_parallel", 6, 12)
    assert "parallel_mode is 0" in checked.notes[0] and "model_parallel" in checked.notes[0]
    with pytest.raises(ValueError, match="use_parallel is False, so the run takes 1 device, not 8"):
        check(changed({"use_parallel": False} | model(offset=0)), 8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (plan(model_parallel=3), "num_heads 8 is not divisible by parallel_config.model_parallel 3"),
        (plan(model_parallel=8), "n_kv_heads 4 is not divisible by parallel_config.model_parallel 8"),
        (model(intermediate_size=98), "intermediate_size 98 is not divisible by .*model_parallel 4"),
        (model(vocab_size=130), "vocab_size 130 is not divisible by .*model_parallel 4"),
        (model(seq_length=65), "batch_size 2 times seq_length 65 is not divisible"),
        (model(hidden_size=129), "hidden_size 129 is not divisible by num_heads 8"),
        (model(hidden_size=120), r"head_dim \(hidden_size / num_heads\) is 15"),
        (model(hidden_size=192), "head_dim is 24, but Ascend's FlashAttentionScore needs a multiple of 16"),
        (model(compute_dtype="float32"), "compute_dtype is float32, but Ascend's attention kernels"),
        ({"context.device_target": "CPU"}, "compute_dtype is bfloat16, for which MindSpore has no operators"),
        (model(offset=0), r"offset must add up to 1: \[0, 1\] for one"),
        (model(offset=[4, -3]), "which gives the stages .* all but the first and the last need at least one"),
        (plan(micro_batch_num=1), "micro_batch_num is 1, less than pipeline_stage 2"),
        (plan(seq_split_num=2), "seq_split_num is 2"),
        (plan(expert_parallel=2), "expert_parallel is 2, but the model has no experts"),
        (plan(data_parallel=0), "parallel_config.data_parallel is 0; it must be a whole number"),
        (plan(data_parallel="2"), "parallel_config.data_parallel is '2'; it must be a whole number"),
        (plan(use_seq_parallel="yes"), "use_seq_parallel is 'yes'; it must be True or False"),
        ({"runner_config.batch_size": 0}, "batch_size is 0; it must be a whole number"),
        (model(tie_word_embeddings=True), "tie_word_embeddings is True, and .*pipeline_stage 2"),
        (model(use_flash_attention=False), "only the fused attention is split over devices"),
        (model(pp_interleave_num=2), r"offset must add up to 1: \[\[0, 1\], \[0, 0\]\] for one"),
        ({"parallel.gradients_mean": True}, "gradients_mean is True"),
        ({"parallel.parallel_mode": 2}, "parallel.parallel_mode is 2; .* 1 .* 0"),
        ({"parallel.full_batch": False}, r"dataset_strategy None; .* \[\[2, 1\], \[2, 1\]\]"),
        (
            {"parallel.pipeline_config": {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}},
            "pipeline_interleave is True; it must be",
        ),
        (
            {"parallel.pipeline_config": {"pipeline_interleave": False, "pipeline_scheduler": "gpipe"}},
            "pipeline_scheduler is gpipe, which MindSpore has for chunks only",
        ),
        (
            {"parallel.pipeline_config": {"pipeline_interleave": False, "pipeline_scheduler": "seqpipe"}},
            "pipeline_scheduler is seqpipe, but this model has 1f1b, and gpipe",
        ),
        ({"parallel.pipeline_config": {"pipeline_interleave": True}}, "without pipeline_scheduler"),
        ({"lr_schedule": {"warmup_steps": 5, "warmup_ratio": 0.0}}, "warmup_steps 5 and warmup_ratio 0.0"),
        ({"micro_batch_interleave_num": 2}, "micro_batch_interleave_num is 2; .* Set it to 1"),
        (model(use_ring_attention=True), "'use_ring_attention', which this model does not have"),
        ({"recompute_config.recompute": [1]}, r"a list of 2 numbers"),
        ({"recompute_config.recompute": [3, 0]}, "asks for 3 layers of stage 0, which has 2"),
        (model(compute_dtype="float64"), "compute_dtype is 'float64'; it must be one of"),
        (model(num_layer=5), "num_layer.*did you mean 'num_layers'"),
        (model(out_proj_has_bias=False), "out_proj_has_bias.*has a bias"),
    ],
)  # fmt: skip
def test_an_illegal_plan_is_refused_by_a_sentence_with_its_values(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(changed(changes))


def test_the_number_of_devices_must_be_the_plans():
    with pytest.raises(ValueError, match="is 16, but 32 devices take part; make them equal"):
        check(SMALL, 32)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (plan(vocab_emb_dp=True), "vocab_emb_dp True has no effect"),
        (plan(gradient_aggregation_group=4), "gradient_aggregation_group has no effect"),
        (plan(pipeline_stage=1) | model(offset=0), "micro_batch_num 4 has no effect"),
        (plan(context_parallel_algo="ulysses_cp"), "context_parallel_algo has no effect"),
        ({"recompute_config.recompute_slice_activation": True}, "recompute_slice_activation has no effect"),
        (
            {"parallel": {"parallel_optimizer_config": {"parallel_optimizer_threshold": 0}}},
            "parallel_optimizer_config has no effect",
        ),
        ({"layer_decay": 0.65}, "layer_decay has no effect"),
    ],
)
def test_a_setting_without_effect_is_noted(changes, note):
    notes = check(changed(changes)).notes
    assert len(notes) == 1 and note in notes[0] and notes[0].endswith(".")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("parallel_config.model_paralel", "parallel_config.model_paralel is read by nothing.*model_parallel"),
        ("runner_config.batchsize", "runner_config.batchsize is read by nothing.*batch_size"),
        ("parallel.paralel_mode", "parallel.paralel_mode is read by nothing.*parallel_mode"),
        (
            "parallel.parallel_optimizer_config.threshold",
            "parallel_optimizer_config.threshold is read by nothing",
        ),
        ("lr_schedule.warmup_step", "lr_schedule.warmup_step is read by nothing.*warmup_steps"),
        ("runner_wrapper.clip_grad", "runner_wrapper.clip_grad is read by nothing.*use_clip_grad"),
        ("context.devices", "context.devices is read by nothing"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
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


def test_the_models_defaults_are_telechatconfigs():
    from research.telechat2.telechat_config import TelechatConfig

    theirs = inspect.signature(TelechatConfig.__init__).parameters
    expected = {
        name: parameter.default
        for name, parameter in theirs.items()
        if name not in ("self", "kwargs", "parallel_config", "moe_config")
    }
    assert model_defaults() == expected


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
