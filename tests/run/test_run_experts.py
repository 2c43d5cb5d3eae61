"""A mixture of experts through run_mindformer.py on a CPU: trains, resumes, converts, evaluates, predicts."""

import re
import subprocess
from pathlib import Path

import pytest
import test_run_mindformer
from small_model import write_weights
from test_run_mindformer import finetune_words, losses, predict_words, size_words, start

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch

records = test_run_mindformer.dataset  # the fixture
EXPERTS = ["--moe_config.expert_num", "4", "--moe_config.num_experts_chosen", "2"]
TRAINING = ["--moe_config.capacity_factor", "1.2"]
TRAINING += ["--moe_config.aux_loss_types", "[expert]", "--moe_config.aux_loss_factors", "[0.01]"]
LOADS = re.compile(
    r"\{ step (\d+), experts: busiest (\d\.\d\d) of a fair share \(layer [01], expert [0-3]\), "
    r"idlest (\d\.\d\d) .* dropped choices (\d+\.\d\d)%, at most (\d+\.\d\d)% \(layer [01]\) \}"
)


def finetune(cwd: Path, records: Path, *more) -> subprocess.CompletedProcess:
    told = start(cwd, *finetune_words(records), *EXPERTS, *TRAINING, *map(str, more))
    assert complaints(told) == []
    return told


def complaints(told: subprocess.CompletedProcess) -> list[str]:
    """Warnings about the experts' statistics, which no checkpoint needs to hold."""
    lines = (told.stdout + told.stderr).splitlines()
    return [line for line in lines if "WARNING" in line and "feed_forward.expert_load" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, records) -> tuple[Path, subprocess.CompletedProcess]:
    """The checkpoints of a finished run of six steps, and what it said."""
    cwd = tmp_path_factory.mktemp("experts")
    return cwd / "output" / "checkpoint", finetune(cwd, records)


def test_every_step_says_how_the_tokens_went(trained):
    checkpoint, told = trained
    assert sorted(losses(told)) == [1, 2, 3, 4, 5, 6]
    loads = LOADS.findall(told.stdout + told.stderr)
    assert [int(step) for step, *_ in loads] == [1, 2, 3, 4, 5, 6]
    for busiest, idlest, mean, most in (map(float, rest) for _, *rest in loads):
        assert 0 <= idlest <= 1 <= busiest <= 2  # two of four experts take each token: twice a fair share
        assert 0 <= mean <= most < 100
    # Room for 39 choices, 1.22 fair shares of 32: what the busiest of four is sent beyond that is dropped.
    assert any(float(busiest) > 1.2 for _, busiest, *_ in loads)
    assert all(float(most) >= 100 * (float(busiest) - 1.23) / 4 for _, busiest, _, _, most in loads)


def test_a_resumed_run_continues_with_the_same_losses(trained, records, tmp_path):
    checkpoint, told = trained
    half = checkpoint / "iteration_00000003"
    resumed = finetune(tmp_path, records, "--load_checkpoint", half, "--resume_training", "True")
    assert losses(resumed) == {step: loss for step, loss in losses(told).items() if step > 3}


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory) -> Path:
    """The trained weights, gone to torch names and back."""
    folder = tmp_path_factory.mktemp("converted")
    convert_to_torch(trained[0], folder / "torch")
    convert_to_mindspore(folder / "torch", folder / "ms")
    return folder / "ms"


def answer(cwd: Path, vocab: Path, checkpoint: Path) -> str:
    words = ["--load_checkpoint", str(checkpoint), "--predict_data", "<_start><_user>生抽？<_bot>"]
    told = start(cwd, *predict_words(vocab, *words, "--output_dir", checkpoint.name), *EXPERTS)
    assert told.returncode == 0, (told.stdout + told.stderr)[-3000:]
    assert complaints(told) == []
    assert "not compared" not in told.stdout
    said = told.stdout.rsplit("Predict Over!", 1)[1].splitlines()[1:]
    return "\n".join(line for line in said if "text_generation_result" not in line)


def test_prediction_takes_what_training_saved_and_what_conversion_wrote(
    trained, converted, small_vocab, tmp_path
):
    found = answer(tmp_path, small_vocab, trained[0])
    assert found.startswith("生抽？") and len(found) > 4
    assert answer(tmp_path, small_vocab, converted) == found


def evaluation(cwd: Path, records: Path, checkpoint: Path) -> str:
    words = ["--config", "finetune_telechat_tiny.yaml", "--run_mode", "eval"]
    words += ["--eval_dataset_dir", str(records), "--load_checkpoint", str(checkpoint)]
    told = start(cwd, *words, *size_words(), *EXPERTS, "--output_dir", f"eval_{checkpoint.name}")
    assert told.returncode == 0, (told.stdout + told.stderr)[-3000:]
    return re.search(r"^evaluation: .*$", told.stdout, re.MULTILINE)[0]


@pytest.mark.slow  # four runs
def test_training_and_evaluation_take_what_training_saved_and_what_conversion_wrote(
    trained, converted, records, tmp_path
):
    folders = (trained[0], converted)
    found = [
        losses(finetune(tmp_path, records, "--load_checkpoint", path, "--output_dir", path.name))
        for path in folders
    ]
    assert found[0] == found[1] != losses(trained[1])
    evaluations = {evaluation(tmp_path, records, path) for path in folders}
    assert len(evaluations) == 1 and "over 384 trained tokens" in evaluations.pop()  # 12 records of 32


def test_dense_weights_are_refused_at_once(records, tmp_path):
    told = finetune(tmp_path, records, "--load_checkpoint", write_weights(tmp_path / "dense"))
    assert told.returncode == 1
    last = told.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "4 experts" in last
    assert str(tmp_path / "dense") in last
