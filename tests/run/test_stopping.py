"""Ctrl-C in a training: what it asks for, and the command that resumes."""

import os
import shlex
import signal
from pathlib import Path

import pytest
from saved_iterations import save_iteration

from research.telechat2.run.stopping import STOP, Interrupted, resuming_command, stopping
from research.telechat2.run.training import farewell


def test_the_first_asks_for_the_end_of_the_step_and_the_second_ends():
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stop, pytest.raises(Interrupted):
        stop.saves = True
        os.kill(os.getpid(), signal.SIGTERM)  # what MindSpore makes of SIGINT while a graph runs
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert issubclass(Interrupted, KeyboardInterrupt)  # exit status 130


def test_where_nothing_can_be_saved_the_first_ends():
    with stopping(), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)
    assert STOP.left and not STOP.requested


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


def test_run_telechat_resumes_by_its_own_flag():
    command = resuming_command(["run_telechat.py", "--resume", "True", "--load_checkpoint", "a"], Path("b"))
    assert command == "python run_telechat.py --load_checkpoint b --resume True"


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
        parallel = farewell(config | {"use_parallel": True}, stop, ["run_mindformer.py"])
        assert "resume with" not in parallel and f"--load_checkpoint {iteration}" in parallel
