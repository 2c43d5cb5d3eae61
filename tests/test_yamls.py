"""Every shipped YAML is read, taken by MindFormers' template and TelechatConfig, and says the right sizes."""

import pytest

from research.telechat2.telechat_run_config import read_config, shipped_configs
from research.telechat2.telechat_run_keys import moe_section

# Parameters of the releases (model card); hidden, layers, heads, feed-forward, vocabulary.
RELEASES = {
    "telechat2-3b": (3072, 24, 24, 6144, 131072, 3_070_528_512),
    "telechat2-7b": (4096, 30, 32, 12288, 131072, 7_617_351_680),
}
# What prediction and training must agree on, for the weights to fit.
SHAPES = ("hidden_size", "num_layers", "num_heads", "n_kv_heads", "intermediate_size", "vocab_size")
EXPERTS = ("expert_num", "num_experts_chosen")
YAMLS = {f"{path.parent.name}/{path.name}": path for path in shipped_configs()}


def model_settings(path) -> dict:
    """What the Trainer makes a model of: ``model_config``, and the section ``moe_config``."""
    config = read_config(path)
    return config["model"]["model_config"] | {"moe_config": moe_section(config)}


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
    finetune = YAMLS.get(name.replace("/predict", "/finetune").replace("_parallel", ""))
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
    assert MindFormerConfig(**raw).model.arch.type == "TelechatForCausalLM"


@pytest.mark.parametrize("name", [name for name in YAMLS if name.split("/")[0] in RELEASES])
def test_its_sizes_give_the_releases_parameter_count(name):
    hidden, layers, heads, width, vocab, parameters = RELEASES[name.split("/")[0]]
    settings = model_settings(YAMLS[name])
    found = [
        settings[key] for key in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")
    ]
    assert found == [hidden, layers, heads, width, vocab]
    # query, key_value, dense with bias; gate, up, down with bias; two norms
    layer = 4 * hidden**2 + hidden + 3 * width * hidden + hidden + 2 * hidden
    assert layers * layer + 2 * vocab * hidden + hidden == parameters


def test_a_size_states_only_what_differs():
    for name, path in YAMLS.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50, name
