"""A YAML runs no code but this project's, and that below --register_path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.config.preflight import Facts, preflight
from research.telechat2.config.yaml_files import read_config
from research.telechat2.run.task import run

CHECKOUT = Path(__file__).resolve().parents[2]
EVIL = "from pathlib import Path\nPath('EXECUTED').touch()\nclass TelechatConfig: pass\n"


def at(dotted: str, value: object) -> dict:
    """A dictionary with ``value`` at ``a.b.0.c``, numbers being places in a list."""
    *outer, last = dotted.split(".")
    found = {last: value}
    for name in reversed(outer):
        found = [found] if name == "0" else {name: found}
    return found


@pytest.mark.parametrize(
    "place",
    [
        "model.model_config", "model.arch", "processor", "processor.tokenizer", "metric", "callbacks.0",
        "eval_callbacks.0", "optimizer", "lr_schedule", "runner_wrapper", "runner_wrapper.scale_sense",
        "trainer", "train_dataset.data_loader", "train_dataset.data_loader.handler.0", "train_dataset_task",
        "eval_dataset.data_loader", "grouped_lr_schedule.grouped.0", "anything.at.0.all",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "reference", ["/tmp/evil.Evil", "../../evil.Evil", "os.path.join", "other/repo--m.C"]
)
def test_a_name_that_leaves_the_folder_is_refused_in_every_section(place, reference):
    with refused("auto_register") as raised:
        preflight(at(f"{place}.auto_register", reference), Facts(register=CHECKOUT / "research/telechat2"))
    assert reference in str(raised.value) and "--register_path" in str(raised.value)


@pytest.mark.parametrize("reference", [5, ["a.B"], "", "B", "a.b.C", "a.C;x", "a\n.C", None])
def test_what_is_no_name_of_a_class_is_refused(reference):
    with refused("--register_path"):
        preflight({"optimizer": {"type": "C", "auto_register": reference}}, Facts())


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "own" / "mine.py").symlink_to(tmp_path / "evil.py")
    with refused("evil.py"):
        preflight({"optimizer": {"type": "C", "auto_register": "mine.C"}}, Facts(register=tmp_path / "own"))


def test_a_module_that_is_not_there_is_named_with_the_folder(tmp_path):
    with refused("mine.py", tmp_path):
        preflight({"optimizer": {"type": "C", "auto_register": "mine.C"}}, Facts(register=tmp_path))


def test_names_below_register_path_stay_and_the_plugins_own_are_known_without(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine: pass\n")
    settings = {
        "optimizer": {"type": "Mine", "auto_register": "mine.Mine", "any_key": 1},
        "model": {
            "arch": {"type": "TelechatForCausalLM", "auto_register": "telechat.TelechatForCausalLM"},
            "model_config": {
                "type": "TelechatConfig", "auto_register": "telechat_register.TelechatConfig",
            },
        },
    }  # fmt: skip
    assert preflight(settings, Facts(register=tmp_path)).notes == []
    assert settings["optimizer"]["auto_register"] == "mine.Mine"
    assert settings["model"]["arch"] == {"type": "TelechatForCausalLM"}
    assert settings["model"]["model_config"] == {"type": "TelechatConfig"}


def test_a_class_of_the_users_own_wins_over_the_plugins(tmp_path):
    (tmp_path / "telechat.py").write_text("class TelechatForCausalLM: pass\n")
    arch = {"type": "TelechatForCausalLM", "auto_register": "telechat.TelechatForCausalLM"}
    settings = {"model": {"arch": dict(arch)}}
    preflight(settings, Facts(register=tmp_path))
    assert settings["model"]["arch"] == arch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust_remote_code": True}, ("trust_remote_code", "True")),
        (at("train_dataset.data_loader.handler.0.trust_remote_code", True), ("trust_remote_code", "True")),
        (at("train_dataset.data_loader.load.load_func", "eval"), ("load_func", "'eval'")),
        (at("train_dataset.data_loader.load.path", "pandas"), ("path", "'pandas'")),
        (at("train_dataset.data_loader.load.data_files", {"a": "x.pkl"}), ("x.pkl",)),
        ({"train_dataset": {"data_loader": {"type": "GeneratorDataset"}}}, ("GeneratorDataset",)),
        ({"processor": {"tokenizer": {"type": "AutoTokenizer"}}}, ("AutoTokenizer",)),
        ({"REGISTER_PATH": "/tmp"}, ("REGISTER_PATH",)),
        ({"use_legacy": False}, ("use_legacy", "False")),
    ],
)
def test_other_ways_to_run_code_are_refused(settings, message):
    with refused(*message):
        preflight(settings, Facts())


def test_yaml_makes_no_python_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("a: !!python/object/apply:os.system ['touch EXECUTED']\n")
    with refused("YAML"):
        read_config(path)


@pytest.mark.parametrize("register", [None, "own"])
def test_a_run_imports_nothing_before_it_refuses(tmp_path, monkeypatch, register):
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "own").mkdir()
    (tmp_path / "own.yaml").write_text(
        f"base_config: {CHECKOUT}/research/telechat2/telechat2-tiny/predict_telechat_tiny.yaml\n"
        f"model:\n  model_config:\n    auto_register: {tmp_path}/evil.TelechatConfig\n"
    )
    monkeypatch.chdir(tmp_path)
    with refused("--register_path"):
        run("own.yaml", {"input_data": "x"}, register)
    with refused("optimizer.auto_register"):
        run(str(CHECKOUT / "research/telechat2/telechat2-tiny/finetune_telechat_tiny.yaml"),
            {"optimizer.auto_register": "../evil.AdamW"}, register)  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.py", "own", "own.yaml"]


@pytest.mark.parametrize(
    "command",
    [
        ["research/telechat2/telechat_plan.py", "--config"],
        ["research/telechat2/run_telechat_predict.py", "x", "--vocab_file_path", "x", "--checkpoint_path",
         "x", "--yaml_file"],
        ["research/telechat2/build_mindie_folder.py", "--output_path", "out", "--yaml_file"],
    ],
)  # fmt: skip
def test_every_command_refuses_it(tmp_path, command):
    (tmp_path / "own.yaml").write_text(
        f"base_config: {CHECKOUT}/research/telechat2/telechat2-tiny/predict_telechat_tiny.yaml\n"
        "callbacks:\n- {type: Evil, auto_register: /tmp/evil.Evil}\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, CHECKOUT / command[0], *command[1:], "own.yaml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "/tmp/evil.Evil" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
