"""Resuming: the position in the data, the step and the schedule agree with a run that never stopped, or it is
refused before anything starts; what is read is checked file by file."""

from dataclasses import replace

import numpy as np
import pytest
from refusal import refused
from safetensors.numpy import save_file
from saved_iterations import RECORD, save_iteration

from research.telechat2.run.load_checkpoint import prepare_checkpoint
from research.telechat2.run.resuming import (
    check_resumption,
    initial_epoch,
    read_iteration,
    whole_iterations,
)
from research.telechat2.run.training_record import read_record

POSITIONS = {"mid-epoch": 8, "border": 10, "finished": 15}
DATA = {
    "same": {},
    "other of the same length": {"data": "b" * 64},
    "more": {"records": 11, "data": "c" * 64, "steps_per_epoch": 11},
    "fewer": {"records": 3, "data": "d" * 64, "steps_per_epoch": 3},
}


def common(step: int, epoch: int | None = None, batch: int = 1) -> dict:
    return {"step_num": step, "epoch_num": epoch or -(-step // 5), "global_batch_size": batch}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("recorded", [True, False])
def test_the_matrix_of_data_batch_and_position(position, data, batch, recorded):
    step = POSITIONS[position]
    now = replace(RECORD, **DATA[data])
    if batch > 1:
        now = replace(now, global_batch_size=batch, steps_per_epoch=now.steps_per_epoch // batch)
    saved = RECORD.at(step) if recorded else None
    if data == "other of the same length" and not recorded and batch == 1 and position != "finished":
        told = check_resumption(saved, common(step), now)
        assert "not compared: the data" in told[1]  # an older checkpoint cannot know, which is printed
        return
    if (data, batch) != ("same", 1) or position == "finished":
        with pytest.raises(ValueError) as refused:
            check_resumption(saved, common(step), now)
        text = str(refused.value)
        if recorded and data != "same":
            assert f"{RECORD.records} records" in text and f"{now.records} records" in text
        if batch > 1:
            assert "1 -> 2" in text
        if (data, batch) == ("same", 1):
            assert "step 15" in text and "3 epochs of 5 steps are 15" in text
        return
    told = check_resumption(saved, common(step), now)
    epoch, within = divmod(step, 5)
    assert f"after step {step} of 15: at epoch {epoch + 1}, step {within + 1} of 5" in told[0]
    assert len(told) == (1 if recorded else 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 7}, ["seed", "0 -> 7"]),
        ({"records": 4}, ["num_samples", "5 -> 4"]),  # the same data, of which less is read
        ({"shuffle": False}, ["shuffle", "True -> False"]),
        ({"sink_size": 3}, ["sink_size: 3", "step 8"]),
        ({"global_batch_size": 4, "devices": 4}, ["1 -> 4"]),
        ({"epochs": 1}, ["step 8", "--runner_config.epochs"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer.type", "None -> Adam"]),  # of which no state is saved
    ],
)
def test_what_moves_the_position_is_refused(changes, told):
    with refused(*told):
        check_resumption(RECORD.at(8), common(8), replace(RECORD, **changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 4}, "had 15 steps and has 20 now"),
        ({"devices": 2}, "devices: 1 -> 2"),
        ({"sink_size": 4}, "had 15 steps and has 12 now"),  # a last sink that is not full is not trained
        ({"lr_schedule": {"learning_rate": 5e-4, "total_steps": -1}}, "learning_rate: 0.001 -> 0.0005"),
        ({"lr_schedule": {"learning_rate": 1e-3, "total_steps": 15}}, "total_steps: -1 -> 15"),
        ({"optimizer": {"eps": 1e-6}}, "optimizer.eps: 1e-08 -> 1e-06"),
        ({"data": None, "records": None, "steps_per_epoch": None}, "the data is not compared"),
    ],
)
def test_what_may_change_is_told_with_both_values(changes, told):
    notes = check_resumption(RECORD.at(8), common(8), replace(RECORD, **changes))
    assert len(notes) == 2 and told in notes[1]


def test_settings_that_change_the_numbers_of_a_step_are_told():
    """Also of a YAML that states a default by now, which is no change; an earlier version recorded none."""
    saved = {
        "model_config.theta": 10000.0,
        "model_config.document_start_ids": [1, 6],
        "runner_wrapper.a": None,
    }
    now = {"model_config.theta": 10000.0, "model_config.document_start_ids": []}
    told = check_resumption(replace(RECORD.at(8), others=saved), common(8), replace(RECORD, others=now))
    assert told[1:] == ["model_config.document_start_ids: [1, 6] -> [], from this step on"]
    assert len(check_resumption(RECORD.at(8), common(8), replace(RECORD, others=now))) == 1


def test_a_finished_run_goes_on_with_more_epochs_by_the_longer_schedule():
    position, note = check_resumption(RECORD.at(15), common(15), replace(RECORD, epochs=5))
    assert "after step 15 of 25: at epoch 4, step 1 of 5" in position
    assert "had 15 steps and has 25 now" in note and "learning rate" in note


def test_epochs_are_counted_by_the_steps():
    # MindFormers takes the epoch of the checkpoint, which counts sinks in sink mode and passes without
    assert [initial_epoch(step, 5, 0) for step in (4, 5, 8, 10)] == [0, 1, 1, 2]
    assert [initial_epoch(step, 5, 1) for step in (4, 5, 8)] == [4, 5, 8]
    assert initial_epoch(8, 5, 4) == 2


@pytest.mark.parametrize(
    ("epoch", "misfit"),
    [(2, False), (8, False), (1, True), (3, True)],  # 8: saved in sink mode, a step is an epoch
)
def test_the_epoch_of_an_older_checkpoint_must_fit_the_steps_of_an_epoch(epoch, misfit):
    if misfit:
        with refused("step 8", f"epoch {epoch}", "epoch 2"):
            check_resumption(None, common(8, epoch), RECORD)
    else:
        check_resumption(None, common(8, epoch), RECORD)


def test_an_iteration_is_read_file_by_file(tmp_path):
    iteration = save_iteration(tmp_path, 8)
    numbers, record = read_iteration(iteration)
    assert numbers["step_num"] == 8 and record == RECORD.at(8) == read_record(iteration)


def without(name: str):
    return lambda folder: (folder / name).unlink()


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-4])


def said(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def one_moment(folder):
    save_file({"adam_m.w": np.zeros((2, 3), np.float32)}, folder / "t-opt-0000000-0000001.safetensors")
    save_file(
        {name: np.zeros((2, 3), np.float32) for name in ("w", "v")},
        folder / "t-model-0000000-0000001.safetensors",
    )


def second_process(folder):
    (folder / "t-opt-0000000-0000001.safetensors").rename(folder / "t-opt-0000001-0000002.safetensors")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("t-opt-0000000-0000001.safetensors"), "*-opt-"),
        (without("t-model-0000000-0000001.safetensors"), "*-model-"),
        (without("common.json"), "common.json"),
        (cut("t-opt-0000000-0000001.safetensors"), "t-opt-0000000-0000001.safetensors"),
        (cut("t-model-0000000-0000001.safetensors"), "t-model-0000000-0000001.safetensors"),
        (said("common.json", "{"), "common.json"),
        (said("common.json", '{"step_num": 8}'), "common.json"),
        (
            said("common.json", '{"step_num": 0, "epoch_num": 1, "global_batch_size": 1}'),
            "'step_num': 0",
        ),
        (
            said("common.json", '{"step_num": 6, "epoch_num": 2, "global_batch_size": 1}'),
            "step 6",
        ),
        (said("training.json", "[]"), "training.json"),
        (one_moment, "adam_m.v"),
        (second_process, "1 files"),
    ],
)
def test_a_missing_or_broken_part_is_named_with_the_iteration_that_is_whole(tmp_path, damage, told):
    save_iteration(tmp_path, 4)
    iteration = save_iteration(tmp_path, 8)
    damage(iteration)
    with refused(told, iteration, f"--load_checkpoint {tmp_path / 'iteration_00000004'}"):
        read_iteration(iteration)
    assert [path.name for path in whole_iterations(tmp_path)] == ["iteration_00000004"]


def test_the_command_refuses_them_before_it_says_what_is_loaded(tmp_path, capsys):
    def prepare(path):
        config = {"load_checkpoint": str(path), "resume_training": True, "checkpoint": {"prefix": "t"}}
        prepare_checkpoint(config | {"output_dir": str(tmp_path / "out")}, training=True)

    folder = tmp_path / "checkpoint"
    prepare(save_iteration(folder, 8))
    assert "weights, optimizer and step" in capsys.readouterr().out
    (folder / "latest_checkpointed_iteration.txt").unlink()
    with refused("latest_checkpointed_iteration.txt", "iteration_00000008"):
        prepare(folder)
    (folder / "iteration_00000008" / "t-opt-0000000-0000001.safetensors").unlink()
    with refused("*-opt-"):
        prepare(folder / "iteration_00000008")
    (folder / "iteration_00000008" / "common.json").unlink()
    with refused("common.json"):
        prepare(folder / "iteration_00000008")
    assert "optimizer" not in capsys.readouterr().out


def test_a_folder_that_names_none_of_its_iterations_is_told_which_is_whole(tmp_path):
    def prepare(path):
        config = {"load_checkpoint": str(path), "resume_training": True, "checkpoint": {"prefix": "t"}}
        prepare_checkpoint(config | {"output_dir": str(tmp_path / "out")}, training=True)

    folder = tmp_path / "checkpoint"
    whole = save_iteration(folder, 8)
    for text in ("", "9", "eight"):  # emptied by a full disk, removed by hand, edited
        (folder / "latest_checkpointed_iteration.txt").write_text(text)
        with refused(f"--load_checkpoint {whole}"):
            prepare(folder)
    with refused(folder):
        prepare(tmp_path)
