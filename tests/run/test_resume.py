"""Training the small model through the Trainer: killed and resumed, and on data that trains nothing."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from research.telechat2.run.resuming import read_iteration

CHECKOUT = Path(__file__).resolve().parents[2]
LOSS = re.compile(r"step:\[\s*(\d+)/\s*(\d+)\], loss:\[([\d.]+)/")
EPOCH = re.compile(r"Epoch:\[\s*(\d+)/")


def command(*words) -> list[str]:
    return [sys.executable, *map(str, words)]


def finetune(*words) -> list[str]:
    shipped = ["--config", "finetune_telechat_tiny.yaml", "--seed", 3]
    return command(CHECKOUT / "run_mindformer.py", *shipped, "--verbose", *words)


def losses(text: str) -> dict[tuple[int, int], str]:
    """(epoch, step of the epoch) -> the loss as printed."""
    lines = [line for line in text.splitlines() if LOSS.search(line)]
    return {(int(EPOCH.search(line)[1]), int(LOSS.search(line)[1])): LOSS.search(line)[3] for line in lines}


@pytest.fixture(scope="module")
def examples_dataset(tmp_path_factory) -> Path:
    """The examples as 14 records, by the commands of the quickstart."""
    folder = tmp_path_factory.mktemp("examples")
    dialogues = CHECKOUT / "examples" / "dialogues.jsonl"
    vocab = folder / "tokenizer.model"
    prepare = CHECKOUT / "research" / "telechat2" / "telechat_preprocess.py"
    for words in (
        [CHECKOUT / "examples" / "train_tokenizer.py", "--input", dialogues, "--output_path", folder],
        [prepare, "--input_dataset_file", dialogues, "--vocab_file_path", vocab, "--max_length", 512]
        + ["--output_path", folder],
    ):
        subprocess.run(command(*words), check=True, capture_output=True, timeout=300)
    return folder / "dataset.mindrecord"


def kill_after(iteration: Path, words: list[str], cwd: Path) -> str:
    """Run until ``iteration`` is saved, then kill without warning; what was written until then."""
    log = cwd / "killed.log"
    with open(log, "w") as file:
        process = subprocess.Popen(words, cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
        tracker = iteration.parent / "latest_checkpointed_iteration.txt"
        for _ in range(3000):
            if tracker.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        still_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    text = log.read_text(errors="replace")
    assert still_running and tracker.exists(), text[-3000:]
    return text


@pytest.mark.slow  # three trainings of the small model: a minute or two
def test_a_run_that_was_killed_continues_as_if_it_never_stopped(examples_dataset, tmp_path):
    """Ten steps lie in the middle of the second of three epochs of seven: other records, another order."""
    words = ["--train_dataset", examples_dataset, "--epochs", 3, "--batch_size", 2]
    words += ["--checkpoint.save_interleaved_steps", 10]
    whole = subprocess.run(
        finetune(*words, "--output_dir", "whole"), cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    expected = losses(whole.stdout + whole.stderr)
    assert list(expected) == [(epoch, step) for epoch in (1, 2, 3) for step in range(1, 8)]
    assert len(set(expected.values())) > 15  # steps differ, so that a repeated or skipped one shows

    tenth = tmp_path / "cut" / "checkpoint" / "iteration_00000010"
    before = losses(kill_after(tenth, finetune(*words, "--output_dir", "cut"), tmp_path))
    assert set(before.items()) <= set(expected.items()) and len(before) >= 9

    words += ["--load_checkpoint", tenth, "--resume_training", "True", "--output_dir", "on"]
    resumed = subprocess.run(finetune(*words), cwd=tmp_path, capture_output=True, text=True, timeout=600)
    found = losses(resumed.stdout + resumed.stderr)
    assert found == {at: loss for at, loss in expected.items() if at > (2, 3)}, resumed.stderr[-3000:]
    assert sorted(os.listdir(tmp_path)) == ["cut", "killed.log", "on", "whole"]


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory) -> tuple[Path, list]:
    """Four records of random ids, of which the third has no trained token, and the words of a tiny model."""
    from mindspore.mindrecord import FileWriter

    file, length = tmp_path_factory.mktemp("small") / "d.mindrecord", 33
    ids = np.random.default_rng(0).integers(4, 64, (4, length)).astype(np.int32)
    labels = ids.copy()
    labels[2] = -100
    writer = FileWriter(str(file), 1)
    column = {"type": "int32", "shape": [-1]}
    writer.add_schema({"input_ids": column, "labels": column}, "records")
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    writer.write_raw_data(rows)
    writer.commit()
    sizes = {
        "num_layers": 1, "hidden_size": 16, "num_heads": 2, "n_kv_heads": 1, "intermediate_size": 32,
        "vocab_size": 64, "seq_length": length - 1,
    }  # fmt: skip
    return file, [word for key, value in sizes.items() for word in (f"--model.model_config.{key}", value)]


def interrupted(words: list[str], cwd: Path, shown: str) -> tuple[int, str]:
    """Status and output of a command whose process group gets Ctrl-C when it has shown a text."""
    log = cwd / "interrupted.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            words, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        for _ in range(3000):
            if shown in log.read_text(errors="replace") or process.poll() is not None:
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(timeout=120)
    return status, log.read_text(errors="replace")


def test_ctrl_c_saves_the_step_and_prints_the_command_that_resumes(small_dataset, tmp_path, monkeypatch):
    """One training: the interrupt, and what is kept; what a resumed run reads is checked in process."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    dataset, sizes = small_dataset
    words = [
        "--train_dataset",
        dataset,
        "--epochs",
        500,
        "--batch_size",
        2,
        "--output_dir",
        "out put",
        *sizes,
    ]
    status, text = interrupted(finetune(*words), tmp_path, "first step")
    assert status == 130, text[-3000:]
    folder = next((tmp_path / "out put" / "checkpoint").glob("iteration_*"))
    common, record = read_iteration(folder)  # whole
    assert record == replace(record, records=4, steps_per_epoch=2, epochs=500, global_batch_size=2, seed=3)
    assert common["step_num"] == record.step >= 1 and f"saved in {folder}" in text
    command = shlex.split(text.rstrip().splitlines()[-1].partition("resume with: ")[2])
    assert command[-4:] == ["--load_checkpoint", str(folder), "--resume_training", "True"]
    assert command[1:-4] == list(map(str, finetune(*words)[1:]))
    assert not any(temporary.iterdir()) and not (tmp_path / "out put" / ".training.lock").exists()


@pytest.mark.slow  # two trainings
def test_the_printed_command_resumes_with_the_losses_of_an_uninterrupted_run(small_dataset, tmp_path):
    dataset, sizes = small_dataset
    words = ["--train_dataset", dataset, "--epochs", 150, "--batch_size", 2, *sizes]
    whole = subprocess.run(
        finetune(*words, "--output_dir", "whole"), cwd=tmp_path, capture_output=True, timeout=600
    )
    assert whole.returncode == 0
    status, text = interrupted(finetune(*words, "--output_dir", "cut"), tmp_path, "first step")
    assert status == 130 and "resume with: " in text, text[-3000:]
    command = text.rstrip().splitlines()[-1].partition("resume with: ")[2]
    again = subprocess.run(
        command.replace("python", shlex.quote(sys.executable), 1),
        shell=True, cwd=tmp_path, capture_output=True, timeout=600,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    expected, found = (metrics(tmp_path / name) for name in ("whole", "cut"))
    assert [step for step, *_ in expected] == list(range(1, 301))
    assert found == expected


def metrics(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and learning rate of each step, in full precision."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines]


@pytest.mark.slow  # four trainings
def test_positions_in_an_epoch_at_its_border_and_after_the_last(small_dataset, tmp_path):
    """Six steps in three epochs; a longer run's learning rates are those of its own schedule, by hand."""
    dataset, sizes = small_dataset
    words = ["--train_dataset", dataset, "--batch_size", 2, "--checkpoint.save_interleaved_steps", 1]
    words += ["--checkpoint.save_max", 9, *sizes]

    def train(epochs, output, step=None):
        more = ["--epochs", epochs, "--output_dir", output]
        if step:
            more += ["--resume_training", "True"]
            more += ["--load_checkpoint", tmp_path / "whole" / "checkpoint" / f"iteration_{step:08d}"]
        told = subprocess.run(finetune(*words, *more), cwd=tmp_path, capture_output=True, text=True)
        return told.returncode, told.stdout + told.stderr

    assert train(3, "whole")[0] == 0
    expected = metrics(tmp_path / "whole")
    for step, name in ((3, "within"), (2, "border")):
        status, text = train(3, name, step)
        assert status == 0, text[-3000:]
        assert metrics(tmp_path / name)[-len(expected) + step :] == expected[step:]
    status, text = train(3, "finished", 6)
    assert status == 1 and "step 6, and 3 epochs of 2 steps are 6" in text
    status, text = train(5, "finished", 6)
    assert status == 0 and "had 6 steps and has 10 now" in text
    # CosineWithWarmUpLR of 10 steps, int(0.05 * 10) = 0 of them warm-up, from 1e-3 to 1e-4
    rates = [1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * step / 10)) for step in range(6, 10)]
    found = metrics(tmp_path / "finished")
    assert [step for step, *_ in found][-4:] == [7, 8, 9, 10]
    np.testing.assert_allclose([rate for *_, rate in found][-4:], rates, rtol=1e-6)


def test_a_record_with_no_trained_token_has_loss_0_and_is_counted(small_dataset, tmp_path):
    """Preprocessing refuses to write one; data from elsewhere may hold it."""
    dataset, sizes = small_dataset
    words = ["--train_dataset", dataset, "--epochs", 1, "--batch_size", 1, "--output_dir", "out", *sizes]
    words += ["--train_dataset.data_loader.shuffle", "False"]
    told = subprocess.run(finetune(*words), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    text = told.stdout + told.stderr
    assert told.returncode == 0, text[-3000:]
    found = [float(loss) for loss in losses(text).values()]
    assert [loss == 0 for loss in found] == [False, False, True, False]
    assert all(np.isfinite(found)) and found[3] > 3  # close to ln 64, nothing broke
    assert text.count("Step 3 trained nothing") == 1 and "1 of 4 steps trained nothing" in text
