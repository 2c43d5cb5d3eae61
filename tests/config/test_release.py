"""Numbers that YAML and config.json both may state: what the release says counts, or an error names both."""

import json

import pytest
from refusal import refused

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.release.stated import said_beside, said_of
from research.telechat2.config.release import Said, settle, settle_model
from research.telechat2.config.yaml_files import read_config, shipped_configs
from research.telechat2.run.save_checkpoint import record_config

RELEASE = Said(
    "w/config.json",
    {"rms_norm_eps": 1e-8, "base_seqlen": 64, "training_seqlen": 128, "eos_token_id": 2},
    head_dim=16,
    names={"rms_norm_eps": "layer_norm_epsilon"},
)


def settle_with(section, weights, where, experts=None):
    settings = {"model": {"model_config": section}, "moe_config": experts}
    return settle_model(settings, said_of(settings, weights), where)


EFFECTIVE = 10000 * 3 ** (16 / 14)  # alpha 3, from base 64 to 128


def test_what_the_yaml_leaves_open_is_the_releases():
    taken, notes = settle({"seq_length": 128}, RELEASE, "a.yaml")
    assert taken == RELEASE.values
    assert "w/config.json: rms_norm_eps 1e-08, base_seqlen 64, training_seqlen 128" in notes[0]


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps: 1e-05", "layer_norm_epsilon in config.json: 1e-08"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps: 1e-5"]),  # YAML 1.1 reads it as text
        ({"training_seqlen": 8192}, ["training_seqlen: 8192", "training_seqlen in config.json: 128"]),
        ({"base_seqlen": 32}, ["base_seqlen: 32"]),
        ({"max_position_embedding": 256}, ["max_position_embedding: 256", "in config.json: 128"]),
        ({"eos_token_id": 7}, ["eos_token_id: 7", "eos_token_id in config.json: 2"]),
        ({"rms_norm_eps": 1e-5, "base_seqlen": 1}, ["rms_norm_eps: 1e-05", "base_seqlen: 1"]),
    ],
    ids=str,
)  # fmt: skip
def test_two_values_are_one_error_that_names_both(stated, named):
    with refused("a.yaml", "w/config.json", *named):
        settle(stated, RELEASE, "a.yaml")


@pytest.mark.parametrize(
    "stated",
    [
        {"rms_norm_eps": "1e-8"}, {"rms_norm_eps": 1e-8, "pad_token_id": -1}, {"theta": 10000},
        {"max_position_embedding": 128, "extend_method": "dynamic_ntk"}, {"extend_method": "None"},
        {"eos_token_id": [2]}, {"theta": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_agrees_is_no_error(stated):
    taken, _ = settle(stated, RELEASE, "a.yaml")
    assert (taken["base_seqlen"], taken["training_seqlen"]) == (64, 128)


@pytest.mark.parametrize(("theta", "said"), [(1e6, True), (EFFECTIVE, False)])
def test_a_base_of_the_yamls_own_goes_without_the_releases_lengths(theta, said):
    """1e6 for longer texts, as in finetune_telechat_7b_32k.yaml; or that of an older imported YAML."""
    taken, notes = settle({"theta": theta}, RELEASE, "a.yaml")
    assert not taken.keys() & {"base_seqlen", "training_seqlen", "theta"}
    assert any("1000000.0" in note for note in notes) == said


def test_defaults_are_named_where_neither_says():
    assert settle({"rms_norm_eps": 1e-6}, None, "a.yaml")[1][0].startswith("theta 10000.0: the default")
    (note,) = settle({}, None, "a.yaml")[1]
    assert "rms_norm_eps 1e-05, theta 10000.0" in note
    assert settle({"rms_norm_eps": 1e-6, "theta": 1e4}, None, "a.yaml") == ({}, [])
    (note,) = settle({"theta": 1e4}, Said("c", {}, 16), "a.yaml")[1]
    assert "rms_norm_eps 1e-05" in note


def test_the_bases_state_no_release_and_every_size_its_own(shared_data):
    """The released config.json of 115B, and every YAML of a size; those of the tiny models leave it open."""
    released = said_beside(shared_data / "release_115b")
    assert released.values["rms_norm_eps"] == 1e-8
    for path in shipped_configs():
        settings = read_config(path)["model"]["model_config"]
        if "tiny" in path.parent.name:
            assert not settings.keys() & {"rms_norm_eps", "theta", "base_seqlen", "training_seqlen"}
        elif "115b" in path.name:
            assert settle(settings, released, path.name)[1] == []
        else:
            assert settings["rms_norm_eps"] == 1e-5 and settings["theta"] in (1e4, 1e6)


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "vocab_size": 160, "rope_theta": 5e5, "rms_norm_eps": 3e-6,
}  # fmt: skip


def llama_beside(folder, **more):
    (folder / "config.json").write_text(json.dumps(LLAMA | more))
    return folder / "x.safetensors"


def test_a_llamas_numbers(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0}
    weights = llama_beside(tmp_path, rope_scaling=scaling)
    section = {}
    settle_with(section, weights, "the YAML")
    assert section == {
        "rms_norm_eps": 3e-6, "theta": 5e5, "tie_word_embeddings": False, "extend_method": "PI",
        "scaling_factor": 4.0,
    }  # fmt: skip
    for stated in (
        {"theta": 10000.0},
        {"rms_norm_eps": 1e-5},
        {"extend_method": "None"},
        {"scaling_factor": 2.0},
    ):
        with refused(next(iter(stated))):
            settle_with(dict(stated), weights, "the YAML")
    settle_with({"theta": 5e5, "extend_method": "pi", "scaling_factor": 4}, weights, "the YAML")
    settle_with({"theta": 1.0, "type": "LlamaConfig"}, weights, "the YAML")  # another's model


def test_two_spellings_of_one_number_in_a_config(tmp_path):
    from oracle import hf_config

    (tmp_path / "config.json").write_text(json.dumps(hf_config({}) | {"rms_norm_eps": 1e-6}))
    with refused("layer_norm_epsilon", "1e-05", "rms_norm_eps", "1e-06"):
        said_beside(tmp_path)


def settings_of(tmp_path, **model_config):
    return {
        "model": {"model_config": {
            "type": "TelechatConfig", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2,
            "intermediate_size": 96, "vocab_size": 128, "seq_length": 256, **model_config,
        }},
        "output_dir": str(tmp_path / "out"), "checkpoint": {"prefix": "t"},
    }  # fmt: skip


def test_numbers_survive_training_and_conversions(tmp_path):
    """Release -> converted file -> training -> torch -> MindSpore: each says what the release said."""
    from oracle import write_hf_folder

    numbers = {
        "layer_norm_epsilon": 1e-8,
        "base_seqlen": 64,
        "training_seqlen": 128,
        "num_key_value_heads": 2,
    }
    write_hf_folder(tmp_path / "hf", numbers, seed=1)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "a.safetensors")
    config = settings_of(tmp_path)
    settle_with(config["model"]["model_config"], tmp_path / "a.safetensors", "the YAML")
    record_config(config, str(tmp_path / "a.safetensors"))
    iteration = tmp_path / "out" / "checkpoint" / "iteration_00000003"
    iteration.mkdir()
    (iteration / "t-model-0000000-0000001.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    (tmp_path / "out" / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("3")
    convert_to_torch(tmp_path / "out" / "checkpoint", tmp_path / "torch")
    convert_to_mindspore(tmp_path / "torch", tmp_path / "ms")
    expected = said_beside(tmp_path / "hf").values
    for path in ("a.safetensors", "out/checkpoint", "out/checkpoint/iteration_00000003", "torch", "ms"):
        assert said_beside(tmp_path / path).values == expected, path


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"rms_norm_eps": 3e-6}, {"rms_norm_eps": 3e-6, "base_seqlen": 256, "training_seqlen": 256}),
        ({"theta": 1e6}, {"theta": 1e6, "base_seqlen": 256, "training_seqlen": 256}),
        ({"extend_method": "PI", "scaling_factor": 2.0}, {"extend_method": "PI", "scaling_factor": 2.0}),
    ],
    ids=str,
)
def test_a_model_from_random_weights_gets_a_config(tmp_path, stated, expected):
    record_config(settings_of(tmp_path, **stated), None)
    said = said_beside(tmp_path / "out" / "checkpoint").values
    assert expected.items() <= said.items()
    section = settings_of(tmp_path, **stated)["model"]["model_config"]
    settle_with(section, tmp_path / "out" / "checkpoint", "the YAML")  # the same YAML agrees with it


def test_a_base_of_the_yamls_own_is_recorded_with_its_length(tmp_path):
    """As finetune_telechat_7b_32k.yaml over a release that was trained at 8K."""
    from oracle import write_hf_folder

    write_hf_folder(
        tmp_path / "hf", {"base_seqlen": 64, "training_seqlen": 64, "num_key_value_heads": 2}, seed=1
    )
    config = settings_of(tmp_path, theta=1e6)
    settle_with(config["model"]["model_config"], tmp_path / "hf", "the YAML")
    record_config(config, str(tmp_path / "hf"))
    said = said_beside(tmp_path / "out" / "checkpoint").values
    assert (said["theta"], said["base_seqlen"], said["training_seqlen"]) == (1e6, 256, 256)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 8}, ("n_head", 4, "num_attention_heads", 8)),
        ({"num_hidden_layers": 5}, ("n_layer", 2, "num_hidden_layers", 5)),
        ({"n_kv_heads": 4, "num_key_value_heads": 2}, ("num_key_value_heads", 2, "n_kv_heads", 4)),
        ({"apply_residual_connection_post_layernorm": True}, ("post_layernorm", "True")),
        ({"embed_layernorm": True}, ("embed_layernorm", "True")),
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'")),
        ({"norm_topk_prob": False}, ("norm_topk_prob", "False")),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ("rope_scaling 'linear'", "extend_method")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "5e5"}}, ("rope_theta", "'5e5'")),
        ({"eos_token_id": "</s>"}, ("eos_token_id", "'</s>'")),
        ({"bos_token_id": [1, None]}, ("bos_token_id",)),
        ({"layer_norm_epsilon": float("nan")}, ("layer_norm_epsilon", "nan")),
    ],
    ids=str,
)  # fmt: skip
def test_a_telechat_config_that_no_tensor_contradicts_is_refused_where_weights_are_read_directly(
    tmp_path, changes, named
):
    from oracle import hf_config

    (tmp_path / "config.json").write_text(json.dumps(hf_config({}) | changes))
    with refused(*named) as raised:
        settle_with({}, tmp_path, "the YAML")
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2, "num_attention_heads": 4}, {"logn": True}, {"rope_scaling": None},
        {"hidden_act": "silu"}, {"apply_residual_connection_post_layernorm": False}, {"eos_token_id": [2, 5]},
        {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, {"rope_parameters": {"rope_type": "default"}},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_telechat_config_may_say_beside(tmp_path, changes):
    from oracle import hf_config

    (tmp_path / "config.json").write_text(json.dumps(hf_config({}) | changes))
    section = {}
    settle_with(section, tmp_path, "the YAML")
    assert (section["rms_norm_eps"], section["eos_token_id"]) == (1e-5, 2) and "theta" not in section


def test_a_base_in_a_section_is_read_as_transformers_5_does(tmp_path):
    from oracle import hf_config

    inner = {"rope_type": "default", "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(
        json.dumps(hf_config({"rope_theta": 1e4, "rope_parameters": inner}))
    )
    assert said_beside(tmp_path).values["theta"] == 500000.0


def test_an_empty_id_of_generation_config_leaves_that_of_config(tmp_path):
    llama_beside(tmp_path, eos_token_id=7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "bos_token_id": 3}))
    values = said_beside(tmp_path / "x.safetensors").values
    assert (values["eos_token_id"], values["bos_token_id"]) == (7, 3)


@pytest.mark.parametrize(
    "said", [{"num_experts_per_tok": 4}, {"moe_config": {"expert_num": 16, "num_experts_chosen": 4}}], ids=str
)
def test_how_many_experts_take_a_token_shows_in_no_tensor(tmp_path, said):
    from oracle import hf_config

    (tmp_path / "config.json").write_text(json.dumps(hf_config({"num_experts": 16}) | said))
    open_, same, other = {"expert_num": 16}, {"expert_num": 16, "num_experts_chosen": 4}, {"expert_num": 16}
    section = {}
    notes = settle_with(section, tmp_path, "the YAML", open_)
    assert open_ == same and "num_experts_chosen 4" in notes[0] and "num_experts_chosen" not in section
    settle_with({}, tmp_path, "the YAML", same)
    with refused("num_experts_chosen", 2, "config.json", 4):
        settle_with({}, tmp_path, "the YAML", other | {"num_experts_chosen": 2})


def test_experts_of_a_config_are_nothing_to_a_dense_yaml(tmp_path):
    """Which the weights refuse."""
    from oracle import hf_config

    (tmp_path / "config.json").write_text(json.dumps(hf_config({}) | {"num_experts_per_tok": 4}))
    section = {}
    notes = settle_with(section, tmp_path, "the YAML", {"expert_num": 1})
    assert "num_experts_chosen" not in section and "num_experts_chosen" not in "".join(notes)
