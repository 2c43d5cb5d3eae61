"""--load_checkpoint: which files it means, and in which shape they are handed to MindFormers."""

from pathlib import Path

import numpy as np
import pytest
from refusal import refused
from small_model import SIZES, write_weights

from research.telechat2.checkpoint.convert_layout import convert_layout
from research.telechat2.run.load_checkpoint import prepare_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


def model_config(**changes) -> dict:
    return {"model": {"model_config": {"type": "TelechatConfig", **SIZES, **changes}}}


def test_weights_are_read_where_they_are(weights, tmp_path):
    """Whatever the path means: a file, a folder, the newest file of the only rank, the latest iteration."""
    file = weights / "model.safetensors"
    ranks = tmp_path / "checkpoint"
    (ranks / "rank_0").mkdir(parents=True)
    for step in (9, 10):
        (ranks / "rank_0" / f"t_rank_0-1_{step}.safetensors").write_bytes(file.read_bytes())
    newest = ranks / "rank_0" / "t_rank_0-1_10.safetensors"
    latest = tmp_path / "saved" / "iteration_00000002"
    latest.mkdir(parents=True)
    (latest / "t-model-0000000-0000001.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    given = {file: file, weights: weights, ranks: newest, ranks / "rank_0": newest, latest.parent: latest}
    for path, source in given.items():
        for training in (True, False):
            config = model_config() | {"load_checkpoint": str(path), "checkpoint": {"prefix": "x"}}
            assert prepare_checkpoint(config, training=training) == source
            folder = str(source if source.is_dir() else source.parent)
            assert config["load_checkpoint"] == config["checkpoint"]["load_path"] == folder
            assert config["checkpoint"]["no_load_optim"] is True
            assert config["load_ckpt_format"] == "safetensors" and config["resume_training"] is False


def test_what_several_ranks_saved_is_left_to_mindformers(weights, tmp_path, capsys):
    iteration = tmp_path / "iteration_00000002"
    iteration.mkdir()
    (iteration / "common.json").touch()
    for rank in range(2):
        (tmp_path / "ranks" / f"rank_{rank}").mkdir(parents=True)
        (tmp_path / "ranks" / f"rank_{rank}" / "t-1_2.ckpt").touch()
        file = iteration / f"t-model-000000{rank}-0000002.safetensors"
        file.write_bytes((weights / "model.safetensors").read_bytes())
    for path, found in ((tmp_path / "ranks", "ckpt"), (iteration, "safetensors")):
        config = model_config() | {"load_checkpoint": str(path), "checkpoint": {"prefix": "x"}}
        config |= {"use_parallel": True}
        assert prepare_checkpoint(config, training=True) is None
        assert "slices" in capsys.readouterr().out
        assert (config["checkpoint"]["load_path"], config["load_ckpt_format"]) == (str(path), found)
    with refused(iteration, "2 files"):
        prepare_checkpoint(config, training=False)


def test_checkpoints_that_cannot_be_loaded_are_refused(weights, tmp_path):
    def prepare(path, training=False, **changes):
        config = (
            model_config() | {"load_checkpoint": str(path), "output_dir": str(tmp_path / "out")} | changes
        )
        prepare_checkpoint(config, training=training)

    with refused(tmp_path / "nowhere"):
        prepare(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with refused("notes.txt", ".safetensors", ".ckpt"):
        prepare(tmp_path / "notes.txt")
    with refused(tmp_path, "rank_*"):
        prepare(tmp_path)
    with refused(weights.parent / "torch", "--resume_training"):
        prepare(weights.parent / "torch", training=True, resume_training=True)
    with refused("model.layers.2"):
        prepare(weights, **model_config(num_layers=3))
    with refused("feed_forward"):
        prepare(weights, **model_config(intermediate_size=96))
    with refused(weights, "--resume_training"):
        prepare(weights, training=True, resume_training=True, checkpoint={"no_save_optim": False})
    with refused(weights, "`checkpoint:`"):
        prepare(weights, training=True, resume_training=True)
    with refused("last.ckpt", "`checkpoint:`"):
        prepare(weights, training=True, resume_training="last.ckpt", checkpoint={"no_save_optim": False})
    with refused("resume_training", "--load_checkpoint"):
        prepare("", training=True, resume_training=True)
    for rank in range(2):
        (tmp_path / "cut" / f"rank_{rank}").mkdir(parents=True)
    with refused("rank_0, rank_1", "--auto_trans_ckpt"):
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
        with refused("feed_forward"):
            prepare_checkpoint(config | model_config(intermediate_size=96), training=False)
    with refused("4 heads", "2 key/value heads", 8):
        prepare_checkpoint(
            model_config(num_heads=8, n_kv_heads=4) | {"load_checkpoint": str(torch)}, training=False
        )


def test_parallel_runs_on_cpus_load_by_our_own_reader(weights):
    """MindFormers' loaders wait for each other by an operator that has no CPU kernel."""
    on_cpus = {"load_checkpoint": str(weights), "use_parallel": True, "context": {"device_target": "CPU"}}
    assert prepare_checkpoint(model_config() | on_cpus, training=True) == weights
    with refused("--use_parallel", "--resume_training"):
        prepare_checkpoint(model_config() | on_cpus | {"resume_training": True}, training=True)


def test_the_parallel_model_reads_any_weights_itself(weights):
    config = model_config() | {"load_checkpoint": str(weights), "use_parallel": True}
    config["model"]["arch"] = {"type": "ParallelTelechatForCausalLM"}
    assert prepare_checkpoint(config, training=False) == weights
    config["model"]["model_config"]["intermediate_size"] = 96
    with refused("feed_forward"):
        prepare_checkpoint(config, training=False)


def test_a_llama_folder_is_sent_to_the_converter(tmp_path):
    from safetensors.numpy import save_file

    save_file({"model.layers.0.self_attn.q_proj.weight": np.zeros((2, 2))}, tmp_path / "model.safetensors")
    with refused(tmp_path, "Llama"):
        prepare_checkpoint(model_config() | {"load_checkpoint": str(tmp_path)}, training=False)


def test_a_truncated_checkpoint_is_refused(weights, tmp_path):
    short = tmp_path / "short.safetensors"
    short.write_bytes((weights / "model.safetensors").read_bytes()[:-100])
    config = model_config() | {"load_checkpoint": str(short), "output_dir": str(tmp_path)}
    with refused("short.safetensors"):
        prepare_checkpoint(config, training=False)


def test_weights_are_compared_where_the_yaml_leaves_the_width_to_a_rule(weights, tmp_path, capsys):
    """SIZES' width 64 by the rule: 2/3 of 4 * 32 is 85, of (0.74 + 0.01) * 128 = 96 it is 64."""

    def prepare(**changes):
        settings = model_config(intermediate_size=None, multiple_of=32, **changes)
        prepare_checkpoint(settings | {"load_checkpoint": str(weights)}, training=False)

    prepare(ffn_dim_multiplier=0.74)
    assert "not compared" not in capsys.readouterr().out
    with refused("feed_forward"):
        prepare()


def test_whole_weights_are_compared_in_parallel_runs_too(weights, tmp_path, capsys):
    config = {"load_checkpoint": str(weights), "use_parallel": True, "output_dir": str(tmp_path)}
    with refused("feed_forward"):
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
    with refused("8 experts", "4 experts"):
        prepare(experts=8)
    with refused("feed_forward.ffn.w1"):
        prepare(intermediate_size=96)


@pytest.mark.parametrize("section", [{}, {"moe_config": None}, {"moe_config": {"expert_num": 1}}])
@pytest.mark.parametrize("training", [False, True])
def test_dense_weights_and_experts_are_never_mixed_up(weights, expert_weights, section, training, tmp_path):
    def prepare(path, moe):
        config = {"load_checkpoint": str(path), "checkpoint": {"prefix": "x"}, "output_dir": str(tmp_path)}
        prepare_checkpoint(model_config() | config | moe, training=training)

    with refused("4 experts", "dense", weights):
        prepare(weights, EXPERTS)
    with refused("4 experts", "dense", expert_weights):
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
