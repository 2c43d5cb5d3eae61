"""YAMLs of MindFormers v1.6.0 and of the torch release's fork: planned as they are, or one list of lines."""

import ast
import re
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from migration_keys import CHANGE, NOTED, USED, keys
from refusal import refused

from research.telechat2.config.check import check
from research.telechat2.config.preflight import Facts, preflight, read_settings
from research.telechat2.plan.command import plan

SHARED = Path(__file__).resolve().parents[3] / "shared"
FILES = sorted((SHARED / "data" / "migration").glob("*.yaml"))
SPEC = SHARED / "spec" / "existing_implementation.md"
needs_files = pytest.mark.skipif(not FILES, reason="the public YAMLs are not here")
TABLES = {"finetune": ("11.1", "11.2"), "predict": ("11.2", "11.3"), "parallel": ("11.3", "11.4")}


def published() -> dict[str, dict]:
    """Every YAML by its name: the files, and those that the specification lists key by key."""
    found = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES}
    for kind, (start, end) in TABLES.items() if SPEC.is_file() else ():
        text = SPEC.read_text(encoding="utf-8")
        text = text[text.index(f"### {start}") : text.index(f"### {end}")]
        rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
        for column, size in enumerate(rows[0][1:], 1):
            found[f"{kind}_{size.strip()}"] = _settings([(row[0], _cell(row, column)) for row in rows[2:]])
    return found


def _cell(row: list[str], column: int) -> str:
    """``(all)`` in the first column: the same for all."""
    return row[1].replace("(all)", "").strip() if "(all)" in row[1] else row[column].strip()


def _settings(rows: list[tuple[str, str]]) -> dict:
    settings: dict = {}
    for key, cell in rows:
        if cell in ("-", ""):
            continue
        *sections, last = re.sub(r"\[(\d)\]", r".\1", key.strip().strip("`")).split(".")
        target = settings
        for name in sections:
            target = target.setdefault(name, {})
        target[last] = ast.literal_eval(cell)
    settings["callbacks"] = [settings["callbacks"][i] for i in sorted(settings.get("callbacks", {}))] or None
    return {name: value for name, value in settings.items() if value is not None}


def keys_of(value: object, place: str = "") -> set[str]:
    if isinstance(value, dict):
        return set().union(*(keys_of(inner, f"{place}.{key}".lstrip(".")) for key, inner in value.items()))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return set().union(*(keys_of(item, f"{place}[]") for item in value))
    return {re.sub(r"^(train|eval)_dataset_task\.dataset_config\.", r"\1_dataset.", place)}


YAMLS = published()


@needs_files
def test_the_table_has_every_key_once():
    tables = [keys(USED), keys(NOTED), {key for name in YAMLS for key in keys_of(YAMLS[name])} & set(CHANGE)]
    found = set().union(*(keys_of(settings) for settings in YAMLS.values()))
    missing = {key for key in found if not any(key.startswith(change) for change in CHANGE)}
    assert missing - tables[0] - tables[1] == set()
    assert (tables[0] | tables[1]) - found == set()
    assert not tables[0] & tables[1]


@pytest.mark.parametrize("name", YAMLS)
def test_keys_are_used_or_noted_as_the_table_says(name):
    settings = deepcopy(YAMLS[name])
    settings.get("model", {}).get("model_config", {}).pop("pet_config", None)
    before = keys_of(settings)
    notes = preflight(settings, Facts()).notes
    after = keys_of(settings) | {key for key in before if key.endswith("auto_register")}  # by type alone
    assert before - after <= keys(NOTED), "left out and not in the table"
    assert not after & (keys(NOTED) - {"layer_decay", "lr_scale_factor"}) - {"eval_callbacks[].type"}
    for key in before - after:
        what = "ObsMonitor" if key.startswith("eval_callbacks") else key.split(".Auto")[0]
        assert any(note.startswith(what) or what in note for note in notes), key
    for key in before & set(CHANGE):
        assert any(note.startswith(key) and CHANGE[key] in note for note in notes)


@pytest.mark.parametrize("name", [name for name in YAMLS if "lora" not in name])
def test_it_is_planned_as_it_is(name, tmp_path):
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(YAMLS[name]), encoding="utf-8")
    report = plan(str(path), {}, estimated=True)
    model = YAMLS[name]["model"]["model_config"]
    if "finetune" in name:
        sizes = YAMLS[name]["parallel_config"]
        devices = sizes["data_parallel"] * sizes["model_parallel"] * sizes["pipeline_stage"]
        assert f"devices       {devices:,} =" in report
        # known to the check alone
        noted = check(read_settings(str(path), {}, Path.cwd())[1]).notes
        assert any("layer_decay" in note for note in noted)
    else:
        devices = YAMLS[name]["parallel_config"]["model_parallel"]
        assert f"devices       {devices if YAMLS[name]['use_parallel'] else 1} " in report
    assert f"{model['seq_length']:,} tokens" in report or f"sequences x {model['seq_length']:,}" in report
    assert "note: model.model_config.pretrain_seqlen has no effect" in report


@needs_files
def test_adapters_are_one_line():
    path = next(path for path in FILES if "lora" in path.name)
    with refused("pet_config") as raised:
        plan(str(path), {})
    assert "\n" not in str(raised.value)


@needs_files
def test_what_must_change_is_listed_at_once():
    """A run on this machine: the file of speed-ups that no release has, and whatever else is wrong."""
    settings = yaml.safe_load((SHARED / "data/migration/finetune_telechat_39b_a12b.yaml").read_text())
    settings["model"]["model_config"] |= {"out_proj_has_bias": False, "pet_config": {"pet_type": "lora"}}
    settings["context"]["deterministic"] = "ON"
    with refused(4) as raised:
        preflight(settings, Facts(task="run"))
    for line in ("parallel_speed_up.json", "out_proj_has_bias", "pet_config", "train_precision_sync: True"):
        assert line in str(raised.value)


@needs_files
def test_the_rules_of_the_plan_are_in_the_same_list(tmp_path):
    """Keys that nothing reads, adapters, schedule, copies, sizes, recomputation: what took one round each."""
    settings = yaml.safe_load((SHARED / "data/migration/fork_lora_telechat_7b.yaml").read_text())
    settings |= {"micro_batch_interleave_num": 2, "swap_config": {"swap": True}, "unheard_of": 1}
    settings["lr_schedule"]["warmup_steps"] = 5
    settings["parallel_config"]["model_parallel"] = 5
    settings["recompute_config"]["recompute"] = [1, 2]
    settings["model"]["model_config"]["attention_dropout_prob"] = 0.1
    path = tmp_path / "lora.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with refused(
        "pet_config", "unheard_of", "warmup_steps 5", "micro_batch_interleave_num", "swap_config.swap",
        "num_heads 32", "parallel_config.model_parallel 5", "[1, 2]", "attention_dropout_prob",
    ) as raised:  # fmt: skip
        plan(str(path), {})
    assert len(raised.value.found) == 8


def test_a_plan_alone_lists_all_that_it_breaks_and_a_wrong_kind_hides_what_follows_from_it(tmp_path):
    changes = {"micro_batch_interleave_num": 2, "lr_schedule.warmup_steps": 5, "optimizer.eps": -1.0}
    with refused("micro_batch_interleave_num", "optimizer.eps", -1.0) as raised:
        plan("finetune_telechat_7b", {k: changes[k] for k in list(changes)[::2]})
    assert len(raised.value.found) == 2
    with refused("num_heads", "'many'") as raised:
        plan("finetune_telechat_7b", {"model.model_config.num_heads": "many"})
    assert len(raised.value.found) == 1


def test_a_length_beyond_training_seqlen_is_named_as_the_yaml_names_it():
    changes = {"model.model_config.training_seqlen": 4096, "model.model_config.extend_method": "None"}
    with refused("seq_length 8192", "training_seqlen 4096"):
        plan("finetune_telechat_7b", changes)


def test_a_folder_that_mindformers_would_mix_in_is_to_be_named_otherwise():
    with refused("pretrained_model_dir", "'/m/x'", "load_checkpoint"):
        preflight({"pretrained_model_dir": "/m/x"}, Facts())
    assert preflight({"pretrained_model_dir": ""}, Facts()).notes == []


def test_the_parallel_model_needs_no_auto_register():
    settings = {
        "model": {"arch": {"type": "ParallelTelechatForCausalLM"}, "model_config": {"type": "TelechatConfig"}}
    }
    assert preflight(settings, Facts()).notes == []


def test_a_callback_that_is_no_more_is_noted_and_others_stay():
    settings = {"callbacks": [{"type": "MFLossMonitor"}, {"type": "ObsMonitor"}], "eval_callbacks": []}
    assert "ObsMonitor" in preflight(settings, Facts()).notes[0]
    assert settings["callbacks"] == [{"type": "MFLossMonitor"}]


@pytest.mark.parametrize("url", ["obs://bucket/x", "s3://bucket/x"])
def test_an_address_to_upload_to_is_no_placeholder(url):
    settings = {"remote_save_url": url}
    assert preflight(settings, Facts()).notes == [] and settings == {"remote_save_url": url}


def test_recomputation_is_left_out_on_cpus_alone():
    """MindSpore 2.9 ends in "Graph cycle exists" there; results are the same without."""
    settings = {"context": {"device_target": "CPU"}, "recompute_config": {"recompute": True}}
    assert "recompute_config.recompute" in preflight(settings, Facts()).notes[0]
    assert settings["recompute_config"] == {}
    settings = {"context": {"device_target": "Ascend"}, "recompute_config": {"recompute": [1, 0]}}
    assert preflight(settings, Facts()).notes == [] and settings["recompute_config"] == {"recompute": [1, 0]}


@pytest.mark.parametrize("key", ["load_checkpoint", "vocab_file"])
def test_a_missing_file_is_blamed_on_the_yaml_that_names_it(tmp_path, key):
    from research.telechat2.infer.loading import load_predictor

    path, there = tmp_path / "own.yaml", tmp_path / "there"
    there.touch()
    base = (
        Path(__file__).resolve().parents[2] / "research/telechat2/telechat2-tiny/predict_telechat_tiny.yaml"
    )
    files = {"load_checkpoint": str(there), "vocab_file": str(there)} | {key: "nowhere"}
    path.write_text(
        f"base_config: {base}\nload_checkpoint: {files['load_checkpoint']}\n"
        f"processor:\n  tokenizer:\n    vocab_file: {files['vocab_file']}\n",
        encoding="utf-8",
    )
    with refused("own.yaml", key, "nowhere") as raised:
        load_predictor(path)
    assert "--" not in str(raised.value)
