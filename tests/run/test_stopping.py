"""Ctrl-C in a training: what it asks for, and the command that resumes."""

import os
import shlex
import signal
from pathlib import Path

import pytest
from saved_iterations import save_iteration

from research.telechat2.run.stopping import StopRequest, resuming_command, stopping
from research.telechat2.run.training import farewell


def test_the_first_asks_for_the_end_of_the_step_and_the_second_ends():
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stop, pytest.raises(KeyboardInterrupt):
        stop.begin()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.is_due(1)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_of_several_processes_never_stops_alone():
    with stopping(alone=False) as stop, pytest.raises(KeyboardInterrupt):
        stop.begin()
        os.kill(os.getpid(), signal.SIGINT)


def test_where_nothing_can_be_saved_the_first_ends():
    with stopping() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not stop.requested


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["run_mindformer.py", "--config", "a b.yaml"], ["run_mindformer.py", "--config", "a b.yaml"]),
        (
            ["x/run_mindformer.py", "--load_checkpoint", "old", "--seed=1"],
            ["x/run_mindformer.py", "--seed=1"],
        ),
        (
            ["run_mindformer.py", "--load=old", "--resume_training=True", "--seed", "1"],
            ["run_mindformer.py", "--seed", "1"],
        ),
        (["run_telechat.py", "--resume", "True", "--load_checkpoint", "a"], ["run_telechat.py"]),
        (
            ["run_mindformer.py", "--options", "load_checkpoint=old", "seed=1", "--register_path", "r"],
            ["run_mindformer.py", "--options", "seed=1", "--register_path", "r"],
        ),
    ],
)
def test_the_command_that_resumes_is_the_command_again(argv, kept):
    command = resuming_command(argv, Path("/out put/checkpoint/iteration_00000008"))
    expected = ["python", *kept, "--load_checkpoint", "/out put/checkpoint/iteration_00000008"]
    assert shlex.split(command) == [*expected, "--resume_training", "True"]


def test_an_interrupted_run_says_what_is_saved(tmp_path):
    config = {"output_dir": str(tmp_path), "checkpoint": {"prefix": "t"}}
    with stopping() as stop:
        assert "no checkpoint is saved" in farewell(config, stop, ["run_mindformer.py"])
        iteration = save_iteration(tmp_path / "checkpoint", 8)
        stop.steps = 3
        said = farewell(config, stop, ["run_mindformer.py"])
        assert "after 3 steps" in said and f"the last checkpoint is {iteration}" in said
        stop.saved = iteration
        said = farewell(config, stop, ["run_mindformer.py"])
        assert f"the last step is saved in {iteration}" in said
        assert said.endswith(f"--load_checkpoint {iteration} --resume_training True")
        done = save_iteration(tmp_path / "checkpoint", 15)
        stop.saved = done
        assert "resume" not in (last := farewell(config, stop, ["x.py"])) and "all 15 steps" in last
        stop.saved = iteration
        parallel = farewell(config | {"use_parallel": True}, stop, ["run_mindformer.py"])
        assert "resume with" not in parallel and f"--load_checkpoint {iteration}" in parallel


def test_the_processes_of_a_node_stop_after_the_same_step(tmp_path, monkeypatch):
    """The launcher asks during step 4; the first process ends it before, the other after."""
    variables = {"TELECHAT_ERRORS": str(tmp_path), "MS_WORKER_NUM": "2", "TELECHAT_LOCAL_WORKERS": "2"}
    for name, value in (variables | {"MS_ROLE": "MS_WORKER"}).items():
        monkeypatch.setenv(name, value)
    first, second = StopRequest(alone=False), StopRequest(alone=False)

    def ends(process, rank, step):
        monkeypatch.setenv("RANK_ID", rank)
        return process.is_due(step)

    monkeypatch.setenv("RANK_ID", "0")
    first.begin()
    assert (tmp_path / "trains").exists()
    assert not ends(first, "0", 3) and not ends(second, "1", 3)
    assert not ends(second, "1", 4)
    (tmp_path / "stop").touch()
    assert not ends(first, "0", 4)
    assert not ends(second, "1", 5) and not ends(first, "0", 5)
    assert ends(second, "1", 6) and ends(first, "0", 6)
    assert first.by_launcher and first.requested


def test_several_nodes_have_no_folder_in_common(tmp_path, monkeypatch):
    variables = {"TELECHAT_ERRORS": str(tmp_path), "MS_WORKER_NUM": "16", "TELECHAT_LOCAL_WORKERS": "8"}
    for name, value in (variables | {"MS_ROLE": "MS_WORKER", "RANK_ID": "0"}).items():
        monkeypatch.setenv(name, value)
    process = StopRequest(alone=False)
    process.begin()
    (tmp_path / "stop").touch()
    assert not process.is_due(4) and not process.is_due(9)
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]
