"""Where runs save, and that they replace nothing of an earlier run."""

import pytest
from refusal import refused
from saved_iterations import save_iteration

from research.telechat2.run.end import saved_checkpoint
from research.telechat2.run.load_checkpoint import prepare_checkpoint
from research.telechat2.run.save_checkpoint import (
    answers_file,
    checkpoint_folder,
    leave_section_in_data_parallel,
    refuse_overwriting,
    settle_monitor,
)


def test_iterations_are_resumed_from_the_latest_and_never_overwritten(tmp_path):
    folder = tmp_path / "checkpoint"
    save_iteration(folder, 20)
    config = {"load_checkpoint": str(folder), "resume_training": True, "checkpoint": {"prefix": "x"}}
    config["output_dir"] = str(tmp_path)
    prepare_checkpoint(config, training=True)
    assert config["checkpoint"]["load_path"] == str(folder / "iteration_00000020")
    assert config["checkpoint"]["no_load_optim"] is False
    refuse_overwriting(config)  # the run that is continued
    with refused(folder, "iteration_00000020", "--output_dir"):
        refuse_overwriting({"checkpoint": {"prefix": "x"}, "output_dir": str(tmp_path)})
    refuse_overwriting({"checkpoint": {"prefix": "x"}, "output_dir": str(tmp_path / "new")})


def test_a_run_continues_in_its_own_folder_from_the_last_step_only(tmp_path):
    folder = tmp_path / "checkpoint"
    for step in (10, 20):
        (folder / f"iteration_{step:08d}").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("20")

    def resume(step, output_dir=tmp_path):
        section = {"load_path": str(folder / f"iteration_{step:08d}")}
        refuse_overwriting({"checkpoint": section, "resume_training": True, "output_dir": str(output_dir)})

    resume(20)
    resume(10, tmp_path / "elsewhere")
    with refused("iteration_00000010", "iteration_00000020"):
        resume(10)
    # killed while it saved iteration 30: the tracker still names 20
    (folder / "iteration_00000030").mkdir()
    resume(20)


@pytest.mark.parametrize("save_path", [None, "weights"])
def test_data_parallel_runs_do_not_replace_the_weights_of_an_earlier_one(tmp_path, save_path):
    config = {
        "checkpoint": {"prefix": "t", "save_path": save_path and str(tmp_path / save_path)},
        "callbacks": [{"type": "CheckpointMonitor"}],
        "use_parallel": True,
        "parallel": {"parallel_mode": 0},
        "output_dir": str(tmp_path),
    }
    leave_section_in_data_parallel(config)
    # MindFormers' CheckpointMonitor appends checkpoint/rank_N to its directory
    folder = tmp_path / (save_path or "") / "checkpoint"
    assert checkpoint_folder(config) == folder
    (folder / "rank_0").mkdir(parents=True)
    refuse_overwriting(config)  # an empty folder is no result
    (folder / "rank_0" / "t_rank_0-1_3.safetensors").touch()
    with refused("rank_0/t_rank_0-1_3.safetensors", "--output_dir"):
        refuse_overwriting(config)
    refuse_overwriting(config | {"resume_training": True, "load_checkpoint": str(folder)})


def test_answers_of_a_prediction_are_kept(tmp_path):
    config = {"output_dir": str(tmp_path)}
    for name in (
        "text_generation_result.txt",
        "text_generation_result_2.txt",
        "text_generation_result_3.txt",
    ):
        assert answers_file(config) == tmp_path / name
        (tmp_path / name).touch()
    with refused("text_generation_result_2.txt"):
        answers_file(config | {"save_file": str(tmp_path / "text_generation_result_2.txt")})
    assert answers_file(config | {"save_file": str(tmp_path / "mine.txt")}) == tmp_path / "mine.txt"


def test_the_section_and_the_callback_state_one_value():
    """MindFormers reads the section alone where there is one."""

    def settings(section: dict, **callback) -> dict:
        return {"checkpoint": section, "callbacks": [{"type": "CheckpointMonitor"} | callback]}

    config = settings({"save_max": 5}, save_checkpoint_steps=3, keep_checkpoint_max=5, prefix=None)
    settle_monitor(config)
    assert config["checkpoint"] == {"save_max": 5, "save_interleaved_steps": 3}
    with refused("save_checkpoint_steps is 3", "checkpoint.save_interleaved_steps is 7"):
        settle_monitor(settings({"save_interleaved_steps": 7}, save_checkpoint_steps=3))
    with refused("prefix is 'mine'", "checkpoint.prefix is 'telechat2'"):
        settle_monitor(settings({"prefix": "telechat2"}, prefix="mine"))
    older = {"callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 3}]}
    settle_monitor(older)
    assert "checkpoint" not in older


def test_data_parallel_runs_save_without_the_section():
    def settings(**changes):
        section = {"save_max": 5, "save_interleaved_steps": 10, "prefix": "x", "no_save_optim": False}
        callbacks = [{"type": "MFLossMonitor"}, {"type": "CheckpointMonitor"}]
        return {"checkpoint": section, "callbacks": callbacks, "use_parallel": True} | changes

    config = settings(parallel={"parallel_mode": 0})
    leave_section_in_data_parallel(config)
    assert "checkpoint" not in config
    assert config["callbacks"] == [
        {"type": "MFLossMonitor"},
        {
            "type": "CheckpointMonitor",
            "checkpoint_format": "safetensors",
            "keep_checkpoint_max": 5,
            "save_checkpoint_steps": 10,
            "prefix": "x",
            "save_optimizer": True,
        },
    ]
    for config in (
        settings(parallel={"parallel_mode": 1}),
        settings(parallel={}),
        settings(use_parallel=False),
    ):
        leave_section_in_data_parallel(config)
        assert config["checkpoint"]["save_max"] == 5


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_what_a_run_has_saved_is_named_in_every_format(tmp_path, suffix):
    """CheckpointMonitor keeps several files in a folder, of which a command reads the one it is given."""
    config = {"output_dir": str(tmp_path)}
    assert saved_checkpoint(config) is None
    folder = tmp_path / "checkpoint" / "rank_0"
    folder.mkdir(parents=True)
    (folder / "meta.json").touch()
    assert saved_checkpoint(config) is None
    for step in ("1_2", "1_10", "1_9"):
        (folder / f"t_rank_0-{step}.{suffix}").touch()
    assert saved_checkpoint(config) == folder / f"t_rank_0-1_10.{suffix}"
