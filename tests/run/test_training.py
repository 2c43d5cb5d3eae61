"""A training before it starts: its folders, its sinks, and whether it goes on at the right record."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from refusal import refused
from saved_iterations import RECORD, save_iteration

from research.telechat2.run import training
from research.telechat2.run.training import leave_sinks_on_cpus, train


def settings(folder: Path, **changes) -> dict:
    return {"output_dir": str(folder / "out"), "checkpoint": {"prefix": "t"}} | changes


@pytest.fixture
def described(monkeypatch):
    """Trainings whose data need not exist: the record of the saved iterations, with changes."""

    def describe(**changes):
        record = replace(RECORD, **changes)
        monkeypatch.setattr(training, "describe_training", lambda config, files: record)
        monkeypatch.setattr(training, "record_config", lambda *given: None)

    return describe


def test_a_cpu_has_no_sinks(capsys):
    """MindFormers multiplies the epochs by the sinks of each; MindSpore then trains whole epochs on a CPU."""
    for runner, target, expected in (
        ({"sink_mode": True}, "CPU", False),
        ({}, "CPU", False),  # MindFormers' default is True
        ({"sink_mode": True}, "Ascend", True),
        ({"sink_mode": False}, "CPU", False),
    ):
        config = {"runner_config": runner, "context": {"device_target": target}}
        leave_sinks_on_cpus(config)
        assert config["runner_config"]["sink_mode"] is expected
    assert capsys.readouterr().out.count("sink_mode") == 2


def test_the_trainer_is_given_the_record_and_the_check(described, tmp_path):
    described()
    iteration = save_iteration(tmp_path / "checkpoint", 8)
    found = []
    config = settings(tmp_path, load_checkpoint=str(iteration), resume_training=True)
    train(config, {}, lambda source, training: found.append(training))
    (given,) = found
    assert given.record == RECORD
    given.open(5, 1, 8, 1.0)
    with refused("5 -> 7"):
        given.open(7, 1, 8, 1.0)
    with refused("1 -> 2"):
        given.open(5, 2, 8, 1.0)


@pytest.mark.parametrize("key", ["ignore_data_skip", "data_skip_steps"])
def test_data_is_not_skipped_otherwise_in_a_run_that_resumes(described, tmp_path, key):
    described()
    iteration = save_iteration(tmp_path / "checkpoint", 8)
    config = settings(tmp_path, load_checkpoint=str(iteration), resume_training=True, **{key: 3})
    with refused(key, 3):
        train(config, {}, lambda *given: pytest.fail("started"))
    assert not (tmp_path / "out").exists()


def test_sinks_that_are_not_full(described, tmp_path, capsys):
    described(sink_size=4)
    train(settings(tmp_path), {}, lambda *given: None)
    assert {"3", "15", "4"} <= set(capsys.readouterr().out.split())
    described(sink_size=16)
    with refused("sink_size", 16, 15):
        train(settings(tmp_path), {}, lambda *given: pytest.fail("started"))


def test_checkpoints_elsewhere_are_one_trainings_too(described, tmp_path):
    described()
    elsewhere = {"checkpoint": {"prefix": "t", "save_path": str(tmp_path / "saves")}}

    def second(*given):
        other = settings(tmp_path / "other", **elsewhere)
        with refused(tmp_path / "saves", "--output_dir"):
            train(other, {}, lambda *given: pytest.fail("started"))

    train(settings(tmp_path, **elsewhere), {}, second)


def test_a_full_disk_is_named_wherever_it_is_found(described, tmp_path):
    """Before the first checkpoint something small is written, whose error may not say where."""
    described()

    def fails(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    with refused(tmp_path / "out", "No space left", kind=OSError):
        train(settings(tmp_path), {}, fails)
