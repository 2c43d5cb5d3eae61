"""Importing changes nothing of MindFormers; installed, and in a run, only what is ours is rerouted."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mindformers import model_runner
from mindformers.core import parallel_config
from mindformers.modules.transformer.moe import MoEConfig
from mindformers.pipeline.text_generation_pipeline import TextGenerationPipeline
from mindformers.tools.register.register import MindFormerRegister
from mindformers.trainer import base_trainer
from mindspore import nn

from research.telechat2.compat.install import PluginModel, install
from research.telechat2.compat.trainer import TrainerHooks, run_by

CHECKOUT = Path(__file__).resolve().parents[2]
IMPORT_ALL = """
import importlib
import os
from pathlib import Path

import mindformers.model_runner
import mindspore
from mindformers.pipeline.text_generation_pipeline import TextGenerationPipeline
from mindformers.tools.register.register import MindFormerRegister
from mindformers.trainer import base_trainer, trainer
from mindformers.trainer.causal_language_modeling import causal_language_modeling

def state():
    owners = {key: module for key, module in sys.modules.items() if key.split(".")[0] == "mindformers"}
    for owner in (TextGenerationPipeline, base_trainer.BaseTrainer):
        owners[f"class {owner.__name__}"] = owner
    found = {f"{key}.{name}": value for key, owner in owners.items() for name, value in vars(owner).items()}
    for kind, classes in MindFormerRegister.registry.items():
        found |= {f"registry {kind} {name}": value for name, value in classes.items()}
    return found

before, handlers = state(), mindspore.log._get_logger().handlers[:]
folder = Path("research/telechat2")
for file in sorted([*folder.glob("*/**/*.py"), *folder.glob("*.py")]):
    parts = file.with_suffix("").parts
    if parts[-1] != "__init__" and not any("-" in part for part in parts):
        importlib.import_module(".".join(parts))
after = state()
print([name for name, value in before.items() if after.get(name) is not value])
print(mindspore.log._get_logger().handlers == handlers)
"""


def test_importing_every_module_changes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.argv[0] = 'x'\n{IMPORT_ALL}"], cwd=CHECKOUT, text=True,
        capture_output=True, env={"LOG_MF_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-2:]) == (0, ["[]", "True"]), done.stderr[-2000:]


class Foreign(nn.Cell):
    """Another model of MindFormers, with a method of that name."""

    def load_weights(self, path):
        pytest.fail("a model of another kind goes the library's way")


class Ours(PluginModel):
    rows = tuple

    def __init__(self):
        nn.Cell.__init__(self)
        self.loaded = []

    def load_weights(self, path):
        self.loaded.append(path)


def test_only_our_models_are_loaded_by_themselves_in_model_runner(monkeypatch):
    by_library = []
    monkeypatch.setattr(
        model_runner, "transform_and_load_checkpoint", lambda *given, **_: by_library.append(given)
    )
    install.cache_clear()
    install()
    install()  # once more changes nothing
    config = SimpleNamespace(checkpoint=SimpleNamespace(load_path="weights"))
    foreign, ours = Foreign(), Ours()
    model_runner.transform_and_load_checkpoint(config, None, foreign, None, do_predict=True)
    model_runner.transform_and_load_checkpoint(config, None, ours, None, do_predict=True)
    assert (by_library, ours.loaded) == ([(config, None, foreign, None)], ["weights"])


def test_only_our_models_read_prompts_as_rows(monkeypatch):
    monkeypatch.setattr(TextGenerationPipeline, "preprocess", lambda self, inputs, **_: ("library", inputs))
    monkeypatch.setattr(TextGenerationPipeline, "run_multi", lambda self, inputs, size: [("library", inputs)])
    install.cache_clear()
    install()
    pipeline = SimpleNamespace(
        network=Foreign(), tokenizer=lambda text, **_: {"input_ids": [len(text)]},
        run_single=lambda inputs: [("single", inputs)],
    )  # fmt: skip
    preprocess, run_multi = TextGenerationPipeline.preprocess, TextGenerationPipeline.run_multi
    assert preprocess(pipeline, ["a"]) == ("library", ["a"])
    assert run_multi(pipeline, ["a", "b", "c"], 2) == [("library", ["a", "b", "c"])]
    pipeline.network = Ours()
    assert preprocess(pipeline, ["a", "bc"]) == {"input_ids": ([1], [2])}
    assert run_multi(pipeline, ["a", "b", "c"], 2) == [("library", ["a", "b"]), ("single", ["c"])]


def test_a_run_leaves_the_trainer_as_it_was():
    class MFTrainOneStepCell(nn.Cell):
        pass

    def registered():
        return MindFormerRegister.get_cls("wrapper", "MFTrainOneStepCell")

    library, step = dict(vars(base_trainer)), registered()
    hooks = TrainerHooks(
        load=lambda network, layouts: None, evaluation_data=lambda config, shard: None,
        opened=lambda config: None, classes=(("wrapper", MFTrainOneStepCell),),
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError), run_by(hooks):
        assert registered() is MFTrainOneStepCell
        assert base_trainer.check_runner_config is not library["check_runner_config"]
        raise ZeroDivisionError
    assert dict(vars(base_trainer)) == library and registered() is step
    assert parallel_config.MoEConfig is MoEConfig
