"""--load_checkpoint: which files it means, and in which shape they are handed to MindFormers."""

from pathlib import Path

import numpy as np
import pytest
from small_model import SIZES, write_weights

from research.telechat2.checkpoint.convert_layout import convert_layout
from research.telechat2.run.load_checkpoint import prepare_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


def model_config(**changes) -> dict:
    return {"model": {"model_config": {"type": "TelechatConfig", **SIZES, **changes}}}


def test_loaders_get_the_shape_they_can_load(weights, tmp_path):
    file = weights / "model.safetensors"
    ranks = tmp_path / "checkpoint"
    (ranks / "rank_0").mkdir(parents=True)
    for step in (9, 10):
        (ranks / "rank_0" / f"t_rank_0-1_{step}.safetensors").write_bytes(file.read_bytes())
    newest = ranks / "rank_0" / "t_rank_0-1_10.safetensors"
    for given, source in ((file, file), (weights, file), (ranks, newest), (ranks / "rank_0", newest)):
        config = model_config() | {
            "load_checkpoint": str(given),
            "checkpoint": {"prefix": "x"},
            "output_dir": str(tmp_path),
        }
        prepare_checkpoint(config, training=True)
        loaded = Path(config["checkpoint"]["load_path"])
        # a folder of its own, without the name that MindFormers takes for a Hugging Face model
        assert [link.resolve() for link in loaded.iterdir()] == [source]
        assert not (loaded / "model.safetensors").exists()
        assert config["load_ckpt_format"] == "safetensors"
        assert config["checkpoint"]["no_load_optim"] is True
    config = model_config() | {"load_checkpoint": str(file), "output_dir": str(tmp_path)}
    prepare_checkpoint(config, training=False)
    assert config["load_checkpoint"] == str(file)  # nothing in the way: loaded where it is
    config = model_config() | {"load_checkpoint": str(ranks), "output_dir": str(tmp_path)}
    prepare_checkpoint(config, training=False)
    assert [link.resolve() for link in Path(config["load_checkpoint"]).iterdir()] == [newest]


def test_checkpoints_that_cannot_be_loaded_are_refused(weights, tmp_path):
    def prepare(path, training=False, **changes):
        config = (
            model_config() | {"load_checkpoint": str(path), "output_dir": str(tmp_path / "out")} | changes
        )
        prepare_checkpoint(config, training=training)

    with pytest.raises(ValueError, match="there is no checkpoint .*nowhere"):
        prepare(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="must end in .safetensors or .ckpt"):
        prepare(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        prepare(tmp_path)
    with pytest.raises(ValueError, match="cannot resume from .*torch: it holds weights, but no optimizer"):
        prepare(weights.parent / "torch", training=True, resume_training=True)
    with pytest.raises(ValueError, match="missing: .*model.layers.2"):
        prepare(weights, **model_config(num_layers=3))
    with pytest.raises(ValueError, match="misshapen: .*feed_forward"):
        prepare(weights, **model_config(intermediate_size=96))
    with pytest.raises(ValueError, match="cannot resume from .* holds weights, but no optimizer"):
        prepare(weights, training=True, resume_training=True, checkpoint={"no_save_optim": False})
    with pytest.raises(ValueError, match="Add the section `checkpoint:`"):
        prepare(weights, training=True, resume_training=True)
    with pytest.raises(ValueError, match="resume_training is 'last.ckpt', but this config has the section"):
        prepare(weights, training=True, resume_training="last.ckpt", checkpoint={"no_save_optim": False})
    with pytest.raises(ValueError, match="nothing to resume from"):
        prepare("", training=True, resume_training=True)
    for rank in range(2):
        (tmp_path / "cut" / f"rank_{rank}").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"slices of 2 ranks \(rank_0, rank_1\)"):
        prepare(tmp_path / "cut")


def test_other_layouts_are_left_to_our_own_reader(weights, tmp_path):
    """Hugging Face folders and files, and weights for parallel inference; compared with the model first."""
    torch = weights.parent / "torch"
    convert_layout(torch, tmp_path / "ranks", qkv_concat=True, tensor_parallel=2)
    (tmp_path / "one").mkdir()
    convert_layout(torch, tmp_path / "one" / "joined.safetensors", qkv_concat=True, tensor_parallel=2)
    given = [torch, torch / "model.safetensors", tmp_path / "ranks", tmp_path / "one" / "joined.safetensors"]
    for path in given:
        config = model_config() | {"load_checkpoint": str(path), "checkpoint": {"prefix": "x"}}
        assert prepare_checkpoint(config, training=True) == path
        folder = str(path if path.is_dir() else path.parent)
        assert config["load_checkpoint"] == config["checkpoint"]["load_path"] == folder
        assert config["checkpoint"]["no_load_optim"] is True and config["load_ckpt_format"] == "safetensors"
        with pytest.raises(ValueError, match="misshapen: .*feed_forward|w_gate_hidden.weight .* should be"):
            prepare_checkpoint(config | model_config(intermediate_size=96), training=False)
    assert prepare_checkpoint(model_config() | {"load_checkpoint": str(weights)}, training=False) is None
    with pytest.raises(ValueError, match="says 4 heads and 2 key/value heads, but the model .* has 8 and 4"):
        prepare_checkpoint(
            model_config(num_heads=8, n_kv_heads=4) | {"load_checkpoint": str(torch)}, training=False
        )


def test_parallel_runs_on_cpus_load_by_our_own_reader(weights):
    """MindFormers' loaders wait for each other by an operator that has no CPU kernel."""
    on_cpus = {"load_checkpoint": str(weights), "use_parallel": True, "context": {"device_target": "CPU"}}
    assert prepare_checkpoint(model_config() | on_cpus, training=True) == weights
    with pytest.raises(ValueError, match="a parallel run on CPUs cannot be resumed"):
        prepare_checkpoint(model_config() | on_cpus | {"resume_training": True}, training=True)


def test_the_parallel_model_reads_any_weights_itself(weights):
    config = model_config() | {"load_checkpoint": str(weights), "use_parallel": True}
    config["model"]["arch"] = {"type": "ParallelTelechatForCausalLM"}
    assert prepare_checkpoint(config, training=False) == weights
    config["model"]["model_config"]["intermediate_size"] = 96
    with pytest.raises(ValueError, match="misshapen: .*feed_forward"):
        prepare_checkpoint(config, training=False)


def test_a_llama_folder_is_sent_to_the_converter(tmp_path):
    from safetensors.numpy import save_file

    save_file({"model.layers.0.self_attn.q_proj.weight": np.zeros((2, 2))}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds a Llama model .* convert it first with .* writes the YAMLs"):
        prepare_checkpoint(model_config() | {"load_checkpoint": str(tmp_path)}, training=False)


def test_a_truncated_checkpoint_is_refused(weights, tmp_path):
    short = tmp_path / "short.safetensors"
    short.write_bytes((weights / "model.safetensors").read_bytes()[:-100])
    config = model_config() | {"load_checkpoint": str(short), "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"short\.safetensors"):
        prepare_checkpoint(config, training=False)


def test_weights_are_compared_where_the_yaml_leaves_the_width_to_a_rule(weights, tmp_path, capsys):
    """SIZES' width 64 by the rule: 2/3 of 4 * 32 is 85, of (0.74 + 0.01) * 128 = 96 it is 64."""

    def prepare(**changes):
        settings = model_config(intermediate_size=None, multiple_of=32, **changes)
        prepare_checkpoint(settings | {"load_checkpoint": str(weights)}, training=False)

    prepare(ffn_dim_multiplier=0.74)
    assert "not compared" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="misshapen: .*feed_forward"):
        prepare()


def test_whole_weights_are_compared_in_parallel_runs_too(weights, tmp_path, capsys):
    config = {"load_checkpoint": str(weights), "use_parallel": True, "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="misshapen: .*feed_forward"):
        prepare_checkpoint(model_config(intermediate_size=96) | config, training=False)
    prepare_checkpoint(model_config() | config, training=False)
    assert "not compared" not in capsys.readouterr().out


EXPERTS = {"moe_config": {"expert_num": 4, "num_experts_chosen": 2}}


@pytest.fixture(scope="module")
def expert_weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("experts"), num_experts=4, num_experts_per_tok=2)


def test_experts_are_compared_by_number_and_shape(expert_weights, tmp_path, capsys):
    def prepare(experts=4, **changes):
        config = model_config(**changes) | {"moe_config": {"expert_num": experts, "num_experts_chosen": 2}}
        prepare_checkpoint(config | {"load_checkpoint": str(expert_weights)}, training=False)

    prepare()
    assert "not compared" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="says 8 experts, but the weights in .* are those of 4 experts"):
        prepare(experts=8)
    with pytest.raises(ValueError, match=r"misshapen: .*feed_forward\.ffn\.w1"):
        prepare(intermediate_size=96)


@pytest.mark.parametrize("section", [{}, {"moe_config": None}, {"moe_config": {"expert_num": 1}}])
@pytest.mark.parametrize("training", [False, True])
def test_dense_weights_and_experts_are_never_mixed_up(weights, expert_weights, section, training, tmp_path):
    def prepare(path, moe):
        config = {"load_checkpoint": str(path), "checkpoint": {"prefix": "x"}, "output_dir": str(tmp_path)}
        prepare_checkpoint(model_config() | config | moe, training=training)

    with pytest.raises(ValueError, match="says 4 experts, but the weights in .* are those of a dense model"):
        prepare(weights, EXPERTS)
    with pytest.raises(ValueError, match="says a dense model, but the weights in .* are those of 4 experts"):
        prepare(expert_weights, section)
    prepare(weights, section)
    prepare(expert_weights, EXPERTS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (model_config(num_heads=None), "the YAML states no num_heads"),
        (model_config(type="LlamaConfig"), "of type LlamaConfig"),
    ],
)
def test_weights_that_cannot_be_compared_are_said_to_be(weights, changes, reason, capsys):
    prepare_checkpoint(changes | {"load_checkpoint": str(weights)}, training=False)
    said = capsys.readouterr().out
    assert "not compared with the model: " in said and reason in said
