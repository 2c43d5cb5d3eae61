"""Mistyped settings are errors wherever MindFormers would pass over them, and values are of their kind."""

import inspect
from copy import deepcopy
from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.config.check import check
from research.telechat2.config.classes import GROUPS, PLUGIN
from research.telechat2.config.fields import kinds_of
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.places import settings_like
from research.telechat2.config.preflight import Facts, preflight, read_settings
from research.telechat2.config.settings_page import page
from research.telechat2.config.tables import SECTIONS
from research.telechat2.config.yaml_files import CHECKOUT, read_config, resolve_config, shipped_configs

MODEL = "model.model_config"


@pytest.mark.parametrize("path", shipped_configs(), ids=lambda path: path.name)
def test_shipped_configs_hold_nothing_without_effect(path: Path):
    settings = read_config(path)
    assert preflight(settings, Facts()).notes == []


def test_the_tables_hold_what_mindformers_knows():
    from mindformers.core.context.build_context import _MSContextApplier
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS

    # adapter_id: LoRA, which these models do not have
    assert set(CONFIG_NAME_TO_CLASS["general_config"].keys()) - {"adapter_id"} <= set(SECTIONS[""])
    assert set(CONFIG_NAME_TO_CLASS) - {"general_config"} <= set(SECTIONS[""])
    assert {key for _, keys, _ in _MSContextApplier._migrate for key in keys} <= set(SECTIONS["context"])
    for section in ("moe_config", "parallel_config", "recompute_config", "swap_config", "runner_config"):
        assert set(CONFIG_NAME_TO_CLASS[section].keys()) == set(SECTIONS[section]), section
    assert set(CONFIG_NAME_TO_CLASS["monitor_config"].keys()) == set(SECTIONS["monitor_config"])


def test_the_classes_have_the_arguments_that_the_tables_say():
    """Of MindFormers' registered classes: no argument that is not there, and no class."""
    from mindformers.tools.register.register import MindFormerRegister

    import research.telechat2.run.registered as register

    assert {name for name, value in vars(register).items() if isinstance(value, type)} == set(PLUGIN)
    found = {name: cls for classes in MindFormerRegister.registry.values() for name, cls in classes.items()}
    # not constructor arguments: what the Trainer and its data set read besides
    besides = {
        "warmup_epochs", "total_steps", "learning_rate", "dataset_dir", "betas", "auto_map", "prompt_format"
    }  # fmt: skip
    for group, classes in GROUPS.items():
        for name, arguments in classes.items():
            if name.startswith("MindIE"):
                continue  # in a folder that build_mindie_folder.py writes
            assert name in found, (group, name)
            parameters = inspect.signature(found[name]).parameters
            free = any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
            if arguments and not free:
                assert set(arguments) - besides <= set(parameters), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"checkpoint.save_interleaved_step": 5},
            ("checkpoint.save_interleaved_step", "save_interleaved_steps"),
        ),
        ({"context.max_device_memry": "1GB"}, ("context.max_device_memry", "max_device_memory")),
        ({"moe_config.expert_nums": 16}, ("moe_config.expert_nums", "expert_num")),
        ({"lr_schedule.warmup_ration": 0.1}, ("lr_schedule.warmup_ration", "warmup_ratio")),
        ({"optimizer.weight_decy": 0.1}, ("optimizer.weight_decy", "weight_decay")),
        ({"runner_wrapper.max_grad_nrm": 1.0}, ("runner_wrapper.max_grad_nrm", "max_grad_norm")),
        (
            {"train_dataset.num_paralel_workers": 1},
            ("train_dataset.num_paralel_workers", "num_parallel_workers"),
        ),
        ({"train_dataset.data_loader.num_sample": 1}, ("data_loader.num_sample", "num_samples")),
        ({"eval_dataset.data_loader.shufle": True}, ("data_loader.shufle",)),
        ({"tensorboard.tensorboard_dri": "x"}, ("tensorboard.tensorboard_dri", "tensorboard_dir")),
        ({"metric.typ": "x"}, None),  # a metric's arguments are not known
        ({"trainer.model_nam": "x"}, ("trainer.model_nam", "model_name")),
        ({"model.arch.typ": "x"}, ("model.arch.typ", "type")),
        ({f"{MODEL}.num_layer": 4}, ("model_config.num_layer", "num_layers", 4)),
        ({f"{MODEL}.use_pas": True}, ("model_config.use_pas", "use_past")),
        ({"context.jit_config.jit_levl": "O1"}, ("context.jit_config.jit_levl", "jit_level")),
        ({"optimizer.type": "AdanW"}, ("optimizer.type", "'AdanW'", "AdamW")),
        (
            {"lr_schedule.type": "CosinWithWarmUpLR"},
            ("lr_schedule.type", "'CosinWithWarmUpLR'", "CosineWith"),
        ),
    ],
)
def test_a_mistyped_key_is_named_in_every_section(change, message):
    """The same for the YAML and the command line, since overrides are set before."""
    if message is None:
        read_settings("finetune_telechat_tiny", change, Path.cwd())
        return
    with refused(*message):
        read_settings("finetune_telechat_tiny", change, Path.cwd())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"moe_config": 16}, ("moe_config", 16)),
        (
            {"model": {"model_config": {"moe_config": {"expert_num": 16}}}},
            ("moe_config",),
        ),
        ({"run_model": "train"}, ("run_model", "run_mode")),
        ({"calbacks": []}, ("calbacks", "callbacks")),
        ({"callbacks": [{"type": "CheckpointMonitor", "prefx": "a"}]}, ("callbacks", "[0]")),
        (
            {"callbacks": [{"type": "StressTestModelMonitor"}]},
            ("callbacks", "[0]", "type", "StressTestModel"),
        ),
        ({"checkpoint": "output/checkpoint"}, ("checkpoint", "'output/checkpoint'")),
    ],
)
def test_mistyped_settings_are_named(config, message):
    with refused(*message):
        preflight(config, Facts())


def test_all_mistakes_are_listed_at_once():
    config = {
        "run_model": "train",
        "seed": "a",
        "parallel_config": {"model_paralel": 4, "data_parallel": "2"},
    }
    with refused(4) as raised:
        preflight(config, Facts())
    for name in ("run_model", "seed is 'a'", "model_paralel", "data_parallel is '2'"):
        assert name in str(raised.value)


@pytest.mark.parametrize("section", ["optimizer", "trainer", "model.arch", "train_dataset.data_loader"])
@pytest.mark.parametrize("kind", [["AdamW"], {"a": 1}, 3])
def test_a_type_that_is_no_name_is_named(section, kind):
    settings: dict = {"type": kind}
    for name in reversed(section.split(".")):
        settings = {name: settings}
    with refused(f"{section}.type", kind):
        preflight(settings, Facts())


def test_a_key_of_an_aliased_section_is_named_once():
    settings = read_config(resolve_config("finetune_telechat_tiny", Path.cwd()))
    settings["train_dataset"]["shufle"] = settings["train_dataset_task"]["dataset_config"]["shufle"] = True
    with refused("shufle") as raised:
        preflight(settings, Facts())
    assert len(raised.value.found) == 1


@pytest.mark.parametrize(
    ("key", "text", "number"),
    [
        ("lr_schedule.learning_rate", "1e-4", 1e-4),
        ("lr_schedule.lr_end", "1E-5", 1e-5),
        ("optimizer.eps", "1.5e10", 1.5e10),
        ("optimizer.weight_decay", "+1e-1", 0.1),
        (f"{MODEL}.rms_norm_eps", "1e-5", 1e-5),
        (f"{MODEL}.theta", "1e6", 1e6),
        ("runner_wrapper.scale_sense", "1e3", 1000.0),
    ],
)
def test_text_that_is_a_number_is_read_as_one(key, text, number):
    """YAML 1.1 reads 1e-4 as text."""
    _, settings = read_settings("finetune_telechat_tiny", {key: text}, Path.cwd())
    *sections, last = key.split(".")
    for section in sections:
        settings = settings[section]
    assert settings[last] == number and isinstance(settings[last], float)


def test_numbers_in_a_list_are_read_too(tmp_path):
    own = tmp_path / "own.yaml"
    base = resolve_config("finetune_telechat_tiny", Path.cwd())
    own.write_text(f"base_config: {base}\noptimizer:\n  betas: [9e-1, 0.95]\n", encoding="utf-8")
    assert read_settings(str(own), {}, Path.cwd())[1]["optimizer"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"{MODEL}.use_past", "False", ("use_past", "'False'", "False")),
        ("use_parallel", "True", ("use_parallel", "'True'", "True")),
        ("runner_config.sink_mode", 1, ("sink_mode", 1, "True")),
        ("runner_config.epochs", "1e1", ("epochs", "'1e1'", 10)),
        ("runner_config.batch_size", 2.0, ("batch_size", "2.0", 2)),
        ("runner_config.batch_size", True, ("batch_size", "True")),
        ("lr_schedule.learning_rate", "fast", ("learning_rate", "'fast'")),
        ("lr_schedule.learning_rate", float("nan"), ("learning_rate", "nan")),
        ("lr_schedule.warmup_steps", "10", ("warmup_steps", "'10'", 10)),
        ("optimizer.betas", 0.9, ("betas", "0.9")),
        (f"{MODEL}.num_layers", None, ("num_layers", "None")),
        (f"{MODEL}.compute_dtype", 32, ("compute_dtype", 32)),
        (f"{MODEL}.do_sample", "true", ("do_sample", "'true'", "True")),
        ("output_dir", 5, ("output_dir", 5, "'5'")),
        ("train_dataset.data_loader.num_samples", "5", ("num_samples", "'5'", 5)),
        ("seed", 1.5, ("seed", "1.5")),
        ("seed", -3, ("seed", -3, 0, 4294967295)),
        ("seed", 2**32, ("seed", 4294967296)),
        ("context.max_device_memory", 58, ("max_device_memory", 58, "'58GB'")),
        ("context.max_device_memory", "58gb", ("max_device_memory", "'58gb'", "'58GB'")),
        ("context.jit_config.jit_level", "O9", ("jit_level", "'O9'", 0, 1, 2)),
        ("context.max_call_depth", 0, ("max_call_depth", 0, 1)),
        ("checkpoint.prefix", "runs/a", ("prefix", "'runs/a'")),
        ("train_dataset.num_parallel_workers", 0, ("num_parallel_workers", 0, 1)),
        ("train_dataset.prefetch_size", -1, ("prefetch_size", -1, 1)),
        ("train_dataset.data_loader.shuffle", "False", ("shuffle", "'False'", "False")),
        ("eval_dataset.data_loader.num_samples", -3, ("num_samples", -3, 1)),
        ("callbacks", ["MFLossMonitor"], ("callbacks", "[{type: MFLossMonitor}]")),
        ("metric", ["Accuracy"], ("metric",)),
        (f"{MODEL}.document_start_ids", ["1", "6"], ("document_start_ids",)),
        (f"{MODEL}.theta", -1, ("theta", -1)),
        (f"{MODEL}.rms_norm_eps", -1e-5, ("rms_norm_eps", "-1e-05")),
        ("runner_config.stop_step", 5, ("stop_step", 5, "TrainCallBack")),
        ("optimizer.type", "Adam", ("optimizer.betas", "[0.9, 0.95]", "betas", "null")),
        ("lr_schedule.type", "LinearWithWarmUpLR", ("lr_end", "0.0001", "LinearWithWarmUpLR", "null")),
    ],
)
def test_a_value_of_another_kind_is_refused_and_says_how_to_write_it(key, value, message):
    with refused(*message):
        check(read_settings("finetune_telechat_tiny", {key: value}, Path.cwd())[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"context.max_device_memory": "54.5GB"},
        {"context.max_device_memory": None},
        {"checkpoint.prefix": "my run"},
        {"callbacks": None},
        {"metric": [{"type": "TelechatPerplexity"}]},
        {"train_dataset.data_loader.shuffle": None},
        {"runner_config.stop_step": 0},
        {"optimizer.type": "Adam", "optimizer.betas": None, "optimizer.beta1": 0.9},
        {"lr_schedule.type": "LinearWithWarmUpLR", "lr_schedule.lr_end": None},
        {"parallel.parallel_optimizer_config.parallel_optimizer_threshold": 8},
    ],
)
def test_legal_values_pass(changes):
    """Also null for what a base YAML states and another class does not have, and a section that is new."""
    check(read_settings("finetune_telechat_tiny", changes, Path.cwd())[1])


def test_null_takes_an_inherited_argument_out():
    changes = {"lr_schedule.type": "LinearWithWarmUpLR", "lr_schedule.lr_end": None}
    assert "lr_end" not in read_settings("finetune_telechat_tiny", changes, Path.cwd())[1]["lr_schedule"]


def test_a_dataset_config_of_its_own_is_checked():
    settings = read_config(resolve_config("finetune_telechat_tiny", Path.cwd()))
    settings["train_dataset_task"] = {
        "type": "CausalLanguageModelDataset",
        "dataset_config": {"shufle": True},
    }
    with refused("train_dataset_task.dataset_config.shufle"):
        preflight(settings, Facts())


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "lr_schedule.learning_rate"),
        ("learning_rate", "lr_schedule.learning_rate"),
        ("epochs", "runner_config.epochs"),
        ("num_train_epochs", "runner_config.epochs"),
        ("batch-size", "runner_config.batch_size"),
        ("max_grad_norm", "runner_wrapper.max_grad_norm"),
        ("model_config.num_layers", "model.model_config.num_layers"),
        ("model.num_layers", "model.model_config.num_layers"),
        ("save_steps", "checkpoint.save_interleaved_steps"),
    ],
)
def test_a_key_in_the_wrong_place_is_named_by_its_own(key, meant):
    assert settings_like(key)[0] == meant
    with refused(key, meant):
        read_settings("finetune_telechat_tiny", {key: 1}, Path.cwd())


def test_the_page_of_settings_is_that_of_the_fields():
    assert (CHECKOUT / "docs" / "settings.md").read_text(encoding="utf-8") == "\n".join(page()) + "\n"


def test_every_field_of_the_model_has_a_kind():
    kinds = kinds_of(ModelSettings)
    assert "any" not in {kind for text in kinds.values() for kind in text.split("|")}
    assert (kinds["use_past"], kinds["n_kv_heads"], kinds["offset"]) == ("bool", "whole|null", "whole|list")


def test_absent_sections_are_fine():
    config = {"seed": 1, "context": {"device_id": 0}, "load_checkpoint": None}
    before = deepcopy(config)
    empty = {"checkpoint": None, "callbacks": None, "moe_config": None, "metric": None}
    nested = {"parallel": {"pipeline_config": None}, "model": {"model_config": None}}
    read = config | empty | deepcopy(nested)
    assert preflight(read, Facts()).notes == [] and read == before | {"parallel": {}, "model": {}}
