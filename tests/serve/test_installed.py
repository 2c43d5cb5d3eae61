"""The plugin installed by pip: its YAMLs come along, and the README's recipe makes a folder that loads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mindie_model import CHECKOUT, SIZES, assert_likeliest, drive, write_yaml
from model_fixtures import RandomModel

SHIPPED = CHECKOUT / "research" / "telechat2"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory to put on the import path, into which pip installed a copy of this checkout."""
    pytest.importorskip("setuptools", reason="building a wheel without a network needs setuptools here")
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", "output", "build", "*.egg-info")
    shutil.copytree(CHECKOUT / "research", source / "research", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    told = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--target", str(place / "target"), str(source)],
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    return place / "target"


def package_files(root: Path) -> set[Path]:
    """All files but compiled ones, documents and their pictures."""
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {path for path in files if "__pycache__" not in path.parts and path.suffix not in (".md", ".svg")}


def test_every_file_comes_along(installed):
    found = package_files(installed / "research" / "telechat2")
    assert Path("telechat2-7b/predict_telechat_7b.yaml") in found
    assert found == package_files(installed.parent / "source" / "research" / "telechat2")


def get_config(folder: Path, installed: Path) -> subprocess.CompletedProcess:
    """Run the copy of get_config.py in a folder."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "get_config.py"], cwd=folder, env=environment, capture_output=True, text=True
    )


def copy_as_the_recipe(folder: Path, yaml_file: Path) -> Path:
    """The files that the README copies into a folder."""
    folder.mkdir()
    for name in ("infer/telechat.py", "telechat_tokenizer.py", "telechat_config.py", "get_config.py"):
        shutil.copy(SHIPPED / name, folder)
    shutil.copy(yaml_file, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(installed, tmp_path_factory) -> tuple[Path, str]:
    """A folder by the recipe for the small mixture of experts, and what get_config.py said."""
    place = tmp_path_factory.mktemp("recipe")
    moe = SHIPPED / "telechat2-tiny" / "predict_telechat_tiny_moe.yaml"
    folder = copy_as_the_recipe(place / "model_path", moe)
    told = get_config(folder, installed)
    assert told.returncode == 0, told.stderr
    return folder, told.stdout


def test_the_recipe_gives_config_json_with_the_experts(recipe):
    folder, said = recipe
    content = json.loads((folder / "config.json").read_text())
    assert content["moe_config"] == {"expert_num": 16, "num_experts_chosen": 4}
    assert (content["intermediate_size"], content["num_layers"], content["model_type"]) == (
        192,
        2,
        "telechat",
    )
    assert "Set in predict_telechat_tiny_moe.yaml: load_checkpoint, processor.tokenizer.vocab_file." in said


def test_the_recipes_yaml_stands_alone(recipe):
    """Its base_config, which the copy no longer finds, is in it; ModelRunner finds the classes."""
    folder, _ = recipe
    served = yaml.safe_load((folder / "predict_telechat_tiny_moe.yaml").read_text(encoding="utf-8"))
    assert "base_config" not in served and served["model"]["model_config"]["block_size"] == 16
    assert served["model"]["model_config"]["auto_map"]["AutoModel"].startswith("telechat_mindie.")
    assert {path.name for path in folder.glob("*.py")} >= {"telechat_mindie.py"}


def test_mistakes_of_the_recipe_end_in_one_sentence(recipe, installed, tmp_path):
    done, _ = recipe
    two = copy_as_the_recipe(tmp_path / "two", SHIPPED / "telechat2-7b" / "predict_telechat_7b.yaml")
    shutil.copy(SHIPPED / "telechat2-3b" / "predict_telechat_3b.yaml", two)
    lost = copy_as_the_recipe(tmp_path / "lost", write_yaml(tmp_path / "lost.yaml"))
    (lost / "lost.yaml").write_text("base_config: ../mine/base.yaml\n")
    elsewhere = tmp_path / "elsewhere"  # as if it were not installed, which this checkout may be
    (elsewhere / "research").mkdir(parents=True)
    (elsewhere / "research" / "__init__.py").write_text("raise ImportError")
    cases = [
        (done, installed, "config.json exists; remove it"),
        (
            two,
            installed,
            "there is predict_telechat_3b.yaml, predict_telechat_7b.yaml",
        ),
        (lost, installed, "lost.yaml.* base_config ../mine/base.yaml"),
        (two, elsewhere, "the plugin is not installed here; run `pip install .`"),
    ]
    for folder, path, said in cases:
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        told = get_config(folder, path)
        assert (told.returncode, told.stdout) == (1, "")
        (error,) = told.stderr.splitlines()
        assert error.startswith("error: ")
        assert re.search(said, error), error
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.slow  # compiles the model in a process of its own
def test_the_recipes_folder_answers_through_model_runner(installed, small_vocab, tmp_path):
    random = RandomModel(tmp_path / "model", seed=5, **SIZES)
    folder = copy_as_the_recipe(tmp_path / "model_path", write_yaml(tmp_path / "predict.yaml"))
    assert get_config(folder, installed).returncode == 0
    served = yaml.safe_load((folder / "predict.yaml").read_text(encoding="utf-8"))
    served["load_checkpoint"] = str(random.weights)
    served["processor"]["tokenizer"]["vocab_file"] = str(small_vocab)
    (folder / "predict.yaml").write_text(yaml.safe_dump(served), encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (told,) = drive(elsewhere, [folder], PYTHONPATH=str(installed))["folders"]
    assert_likeliest(random, told)
