"""Every shipped YAML is read, taken by MindFormers' template and TelechatConfig, and says the right sizes."""

import re
from math import prod
from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.config.check import check
from research.telechat2.config.preflight import read_settings
from research.telechat2.config.sections import section_of
from research.telechat2.config.sharing import memory_of_rank, prediction_plan
from research.telechat2.config.yaml_files import read_config, resolve_config, shipped_configs

# Parameters of the releases (model card); hidden, layers, heads, key/value heads, feed-forward.
RELEASES = {
    "telechat2-3b": (3072, 24, 24, None, 6144, 3_070_528_512),
    "telechat2-7b": (4096, 30, 32, None, 12288, 7_617_351_680),
    "telechat2-35b": (6144, 64, 48, None, 20480, 35_435_059_200),
    "telechat2-115b": (8192, 96, 64, 8, 40960, 113_282_916_352),
    "telechat2-39b-a12b": (4096, 30, 32, None, 6144, 39_330_099_200),
}
# The published clusters: devices, sequences of a step, layers of each stage.
CLUSTERS = {
    "finetune_telechat_7b.yaml": (8, 8, [30]),
    "finetune_telechat_35b.yaml": (16, 32, [15, 17, 17, 15]),
    "finetune_telechat_115b.yaml": (512, 64, [10, 11, 12, 13, 13, 13, 13, 11]),
    "finetune_telechat_115b_64p.yaml": (64, 8, [12] * 8),
    "finetune_telechat_39b_a12b.yaml": (1024, 512, [15, 15]),
}
# What prediction and training must agree on, for the weights to fit.
SHAPES = ("hidden_size", "num_layers", "num_heads", "n_kv_heads", "intermediate_size", "vocab_size")
EXPERTS = ("expert_num", "num_experts_chosen")
YAMLS = {f"{path.parent.name}/{path.name}": path for path in shipped_configs()}


def model_settings(path) -> dict:
    """What the Trainer makes a model of: ``model_config``, and the section ``moe_config``."""
    config = read_config(path)
    plan = config.get("parallel_config", {}) | {"recompute": config.get("recompute_config", {})}
    return config["model"]["model_config"] | {
        "moe_config": section_of(config, "moe_config"),
        "parallel_config": plan,
    }


@pytest.mark.parametrize("name", YAMLS)
def test_it_makes_a_model_config(name):
    from research.telechat2.telechat_config import TelechatConfig

    settings = model_settings(YAMLS[name])
    config = TelechatConfig(**settings)
    assert config.use_past == YAMLS[name].name.startswith("predict")
    assert config.block_size * config.num_blocks >= config.seq_length or not config.use_past
    experts = (config.moe.num_experts, config.moe.top_k) if config.moe else None
    assert experts == ((16, 4) if any(size in name for size in ("tiny_moe", "39b_a12b")) else None)


@pytest.mark.parametrize("name", [name for name in YAMLS if "/predict" in name])
def test_what_is_trained_is_what_is_asked(name):
    """A size's two YAMLs describe one model."""
    finetune = YAMLS.get(re.sub("(_16k)?(_parallel)?.yaml", ".yaml", name.replace("/predict", "/finetune")))
    if finetune is None:
        pytest.skip("this size ships no finetune YAML yet")
    trained, asked = model_settings(finetune), model_settings(YAMLS[name])
    for key in SHAPES:
        assert trained.get(key) == asked.get(key), key
    for key in EXPERTS:
        assert trained["moe_config"].get(key) == asked["moe_config"].get(key), key


@pytest.mark.parametrize("name", YAMLS)
def test_mindformers_template_takes_it(name):
    from mindformers import MindFormerConfig
    from mindformers.tools.register.template import ConfigTemplate

    raw = read_config(YAMLS[name])
    ConfigTemplate.apply_template(raw)
    kind = "ParallelTelechatForCausalLM" if name.endswith("_parallel.yaml") else "TelechatForCausalLM"
    assert MindFormerConfig(**raw).model.arch.type == kind


@pytest.mark.parametrize("name", [name for name in YAMLS if name.split("/")[0] in RELEASES])
def test_its_sizes_give_the_releases_parameter_count(name):
    hidden, layers, heads, kv_heads, width, parameters = RELEASES[name.split("/")[0]]
    settings = model_settings(YAMLS[name])
    found = [settings.get(key) for key in SHAPES]
    vocab = 131072
    assert found == [hidden, layers, heads, kv_heads, width, vocab]
    experts = settings["moe_config"].get("expert_num", 1)
    keys = 2 * hidden * (kv_heads or heads) // heads
    # query, key_value, dense with bias, two norms; gate, up, down with bias of each expert; the router
    attention = 2 * hidden**2 + keys * hidden + hidden + 2 * hidden
    router = experts * hidden if experts > 1 else 0
    layer = attention + experts * (3 * width * hidden + hidden) + router
    assert layers * layer + 2 * vocab * hidden + hidden == parameters


@pytest.mark.parametrize("name", [name for name in YAMLS if "/predict" not in name])
def test_its_plan_is_legal_and_nothing_in_it_is_without_effect(name):
    _, settings = read_settings(str(YAMLS[name]), {}, Path.cwd())
    checked = check(settings)
    assert checked.notes == ()
    assert checked.device_num == prod(checked.factors.values())
    assert (
        sum(stage.num_layers for stage in checked.stages) == settings["model"]["model_config"]["num_layers"]
    )
    if published := CLUSTERS.get(YAMLS[name].name):
        layers = [stage.num_layers for stage in checked.stages]
        assert (checked.device_num, checked.global_batch, layers) == published


@pytest.mark.parametrize("name", [name for name in YAMLS if "/finetune" in name and "tiny" not in name])
def test_its_training_fits_the_memory_that_it_may_take(name):
    from research.telechat2.plan.estimate.estimate import estimate

    _, settings = read_settings(str(YAMLS[name]), {}, Path.cwd())
    estimated = estimate(settings)
    stated = settings["context"]["max_device_memory"]
    assert f"{estimated.limit_gb:g}GB" == stated
    assert estimated.peak_bytes <= estimated.limit_gb * 1e9
    assert "fits  " in estimated.table()


# The published numbers of NPUs that predict; the other sizes are shared by as many as there are.
NPUS = {"35b": 2, "115b": 8, "39b_a12b": 2}


@pytest.mark.parametrize("name", [name for name in YAMLS if "/predict" in name])
def test_its_prediction_is_planned_for_its_npus_and_fits_their_memory(name):
    """Sizes divide, weights and cache fit; a YAML of prediction says nothing of training."""
    settings = read_config(YAMLS[name])
    training = (
        "optimizer",
        "lr_schedule",
        "train_dataset",
        "runner_wrapper",
        "callbacks",
        "recompute_config",
    )
    assert not settings.keys() & {*training, "runner_config", "checkpoint", "train_dataset_task"}
    read_settings(str(YAMLS[name]), {}, Path.cwd())  # and nothing that nobody reads
    size = re.search("telechat_(.*?)(_16k)?(_moe)?(_parallel)?.yaml", name)[1]
    if name.endswith("_parallel.yaml"):
        assert settings["use_parallel"]
        processes = (1, 2) if size == "tiny" else (1, 2, 4, 8)
        for count in [NPUS[size]] if size in NPUS else processes:
            plan = prediction_plan(settings, count)
            assert plan == {} if count == 1 else plan["model_parallel"] == count
    elif size in NPUS:
        assert prediction_plan(settings | {"use_parallel": True}, NPUS[size])["model_parallel"] == NPUS[size]
        with refused("max_device_memory", "58GB", "use_parallel"):
            prediction_plan(settings, 1)
    else:
        assert prediction_plan(settings, 1) is None


@pytest.mark.parametrize("folder", RELEASES)
def test_the_estimate_of_memory_counts_the_releases_weights(folder):
    """By the parameters of the model card, and the caches' shapes."""
    from research.telechat2.telechat_config import TelechatConfig

    name = next(name for name in YAMLS if name.startswith(f"{folder}/predict") and "16k" not in name)
    config = TelechatConfig(**model_settings(YAMLS[name]) | {"parallel_config": {}})
    hidden, layers, heads, kv_heads, _, parameters = RELEASES[folder]
    weights, cache = memory_of_rank(config, 1)
    assert weights == 2 * parameters
    assert cache == 2 * layers * 8192 * hidden * (kv_heads or heads) // heads * 2
    parts, part = memory_of_rank(config, 8)
    assert part == cache // 8 and weights / 8 < parts < weights / 8 + 0.005 * weights


def test_both_readme_spellings_of_the_39b_resolve():
    for spelling in ("predict_telechat_39b_a12b.yaml", "predict_telechat_39b_a12b_parallel.yaml"):
        found = resolve_config(f"./research/telechat2/{spelling}", Path.cwd())
        assert found == YAMLS[f"telechat2-39b-a12b/{spelling}"]


def test_every_size_has_a_plan_for_its_cluster():
    assert set(CLUSTERS) <= {path.name for path in YAMLS.values()}


def test_a_size_states_only_what_differs():
    for name, path in YAMLS.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50, name
