"""Mistyped settings are errors wherever MindFormers would pass over them."""

from pathlib import Path

import pytest

from research.telechat2.telechat_run_config import read_config, shipped_configs
from research.telechat2.telechat_run_keys import KEYS, SECTIONS, TOP_LEVEL, check_keys


@pytest.mark.parametrize("path", shipped_configs(), ids=lambda path: path.name)
def test_shipped_configs_hold_known_keys_only(path: Path):
    check_keys(read_config(path))


def test_the_lists_hold_what_mindformers_knows():
    from mindformers.core.context.build_context import _MSContextApplier
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS

    # adapter_id: LoRA, which these models do not have
    assert set(CONFIG_NAME_TO_CLASS["general_config"].keys()) - {"adapter_id"} <= set(TOP_LEVEL)
    assert set(CONFIG_NAME_TO_CLASS) - {"general_config"} <= set(SECTIONS)
    assert {key for _, keys, _ in _MSContextApplier._migrate for key in keys} <= set(KEYS["context"])
    assert set(CONFIG_NAME_TO_CLASS["moe_config"].keys()) == set(KEYS["moe_config"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"checkpoint": {"save_interleaved_step": 5}}, "checkpoint.save_interleaved_step .*mean save_inter"),
        (
            {"context": {"max_device_memry": "1GB"}},
            "context.max_device_memry .*Did you mean max_device_memory",
        ),
        ({"moe_config": {"expert_nums": 16}}, "moe_config.expert_nums .*Did you mean expert_num"),
        ({"moe_config": 16}, "`moe_config` is 16; expected a section"),
        (
            {"model": {"model_config": {"moe_config": {"expert_num": 16}}}},
            "moe_config stands in model.model_config, .* move it to the top of the YAML",
        ),
        ({"run_model": "train"}, "the setting run_model .*Did you mean run_mode"),
        ({"calbacks": []}, "the setting calbacks .*Did you mean callbacks"),
        ({"checkpoint": "output/checkpoint"}, "`checkpoint` is 'output/checkpoint'; expected a section"),
    ],
)
def test_mistyped_settings_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        check_keys(config)


def test_absent_sections_are_fine():
    check_keys({"seed": 1, "checkpoint": None, "context": {"device_id": 0}})
