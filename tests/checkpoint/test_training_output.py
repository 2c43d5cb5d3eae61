"""What training leaves behind converts as it is: weights out, optimizer states and counters counted."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from oracle import stored_tensors, write_hf_folder
from refusal import refused
from safetensors.numpy import load_file, save_file

from research.telechat2.checkpoint.convert import (
    convert_to_mindspore,
    convert_to_torch,
    read_mindspore_tensors,
)

# No step of training is needed to save: a cell of the model's parameters, MindFormers' AdamW and its saver.
SAVE = """
import sys
import mindspore
from mindspore import nn
from mindformers.checkpoint.checkpoint import CommonInfo, save_checkpoint
from mindformers.core.optim import AdamW

cell = nn.Cell()
for name, parameter in mindspore.load_checkpoint(sys.argv[1], format="safetensors").items():
    parameter.name = name
    cell.insert_param_to_cell(name.replace(".", "_"), parameter)
optimizer = AdamW(cell.trainable_params(), learning_rate=1e-3)
common = CommonInfo()
common.global_step = common.step_num = 3
save_checkpoint(
    3, cell, optimizer, common_info=common, user_prefix="telechat", save_checkpoint_path="checkpoint"
)
old = [{"name": p.name, "data": p} for p in [*cell.get_parameters(), *optimizer.get_parameters()]]
counters = {"epoch_num": 1, "step_num": 3, "loss_scale": 1.0, "global_batch_size": 8}
for kind in ("safetensors", "ckpt"):
    mindspore.save_checkpoint(
        list({p["name"]: p for p in old}.values()),
        f"telechat_rank_0-1_3.{kind}",
        format=kind,
        append_dict=counters,
    )
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the HF original, and what MindFormers and MindSpore save of it."""
    folder = tmp_path_factory.mktemp("trained")
    write_hf_folder(folder / "hf", {"num_key_value_heads": 2}, seed=1)
    convert_to_mindspore(folder / "hf", folder / "ms.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", SAVE, "ms.safetensors"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def back_equals_original(source, trained, tmp_path):
    summary = convert_to_torch(source, tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(trained / "hf")
    return summary


@pytest.mark.parametrize("path", ["checkpoint", "checkpoint/iteration_00000003"])
def test_mindformers_checkpoint_section(trained, tmp_path, path):
    """The folder with the tracker file, or that of the iteration: -model- and -opt- files side by side."""
    summary = back_equals_original(trained / path, trained, tmp_path)
    assert summary.ignored == {"optimizer states": 2 * 23, "training counters and scalars": 2}
    assert {file.parent.name for file in summary.sources} == {"iteration_00000003"}
    assert "46 optimizer states, 2 training counters and scalars" in str(summary)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_legacy_rank_folder(trained, tmp_path, kind):
    rank = tmp_path / "checkpoint" / "rank_0"
    rank.mkdir(parents=True)
    shutil.copy(trained / f"telechat_rank_0-1_3.{kind}", rank)
    (rank / "meta.json").write_text("{}")
    summary = back_equals_original(tmp_path / "checkpoint", trained, tmp_path)
    assert summary.ignored == {"optimizer states": 2 * 23, "training counters and scalars": 6}

    shutil.copy(rank / f"telechat_rank_0-1_3.{kind}", rank / f"telechat_rank_0-1_6.{kind}")
    with refused(rank, "-1_3", "-1_6"):
        convert_to_torch(rank, tmp_path / "other")


def test_the_models_loader_sees_weights_only(trained):
    arrays = dict(read_mindspore_tensors(trained / "telechat_rank_0-1_3.ckpt"))
    expected = load_file(trained / "ms.safetensors")
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], array) for name, array in expected.items())


def test_caches_and_gradients_are_left_out(trained, tmp_path):
    extra = {
        "model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache": np.ones(2, np.float16),
        "model.layers.0.attention.infer_attention.paged_attention_mgr.value_cache": np.ones(2, np.float16),
        "accu_grads.lm_head.weight": np.ones(2, np.float32),
    }
    save_file(load_file(trained / "ms.safetensors") | extra, tmp_path / "x.safetensors")
    summary = back_equals_original(tmp_path / "x.safetensors", trained, tmp_path)
    assert summary.ignored == {"key/value caches": 2, "optimizer states": 1}


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.attention.wq.bias", "adam_m", "ema.lm_head.weight", "model.layers.2.ffn_norm.weight"],
)
def test_anything_else_is_an_error(trained, tmp_path, name):
    tensors = load_file(trained / "ms.safetensors") | {name: np.ones(64, np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    with refused(tmp_path / "x.safetensors") as caught:
        convert_to_torch(tmp_path / "x.safetensors", tmp_path / "back")
    assert name in str(caught.value) or "model.layers.2.attention.wq.weight" in str(caught.value)


def test_checkpoints_of_several_devices(trained, tmp_path):
    iteration = tmp_path / "iteration_00000001"
    iteration.mkdir()
    for rank in range(2):
        shutil.copy(trained / "ms.safetensors", iteration / f"t-model-000000{rank}-0000002.safetensors")
    with refused(iteration, 2, "-model-"):
        convert_to_torch(iteration, tmp_path / "back")
    back_equals_original(iteration / "t-model-0000001-0000002.safetensors", trained, tmp_path)

    whole = load_file(trained / "ms.safetensors")
    for rank in range(2):  # slices of a sharded optimizer, not of tensor parallelism
        (tmp_path / "checkpoint" / f"rank_{rank}").mkdir(parents=True)
        slices = {
            name: np.split(value, 2)[rank] if value.ndim == 2 else value for name, value in whole.items()
        }
        save_file(slices, tmp_path / "checkpoint" / f"rank_{rank}" / "t-1_2.safetensors")
    with pytest.raises(
        ValueError, match="(?s)misshapen: .* its slices, merge them first with .*transform_ckpt"
    ):
        convert_to_torch(tmp_path / "checkpoint", tmp_path / "back2")


@pytest.mark.parametrize("number", ["7", "", "²", "../3", "x" * 500])
def test_tracker_without_its_iteration(tmp_path, number):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(number, encoding="utf-8")
    with refused("latest_checkpointed_iteration.txt"):
        convert_to_torch(tmp_path, tmp_path / "back")
