"""Training the small model through the Trainer: killed and resumed, and on data that trains nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
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


def test_a_record_with_no_trained_token_has_loss_0_and_is_counted(tmp_path):
    """Preprocessing refuses to write one; data from elsewhere may hold it."""
    from mindspore.mindrecord import FileWriter

    length = 33
    ids = np.random.default_rng(0).integers(4, 64, (4, length)).astype(np.int32)
    labels = ids.copy()
    labels[2] = -100
    writer = FileWriter(str(tmp_path / "d.mindrecord"), 1)
    column = {"type": "int32", "shape": [-1]}
    writer.add_schema({"input_ids": column, "labels": column}, "records")
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    writer.write_raw_data(rows)
    writer.commit()
    sizes = {
        "num_layers": 1, "hidden_size": 16, "num_heads": 2, "n_kv_heads": 1, "intermediate_size": 32,
        "vocab_size": 64, "seq_length": length - 1,
    }  # fmt: skip
    words = ["--train_dataset", "d.mindrecord", "--epochs", 1, "--batch_size", 1, "--output_dir", "out"]
    words += ["--train_dataset.data_loader.shuffle", "False"]
    for key, value in sizes.items():
        words += [f"--model.model_config.{key}", value]
    told = subprocess.run(finetune(*words), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    text = told.stdout + told.stderr
    assert told.returncode == 0, text[-3000:]
    found = [float(loss) for loss in losses(text).values()]
    assert [loss == 0 for loss in found] == [False, False, True, False]
    assert all(np.isfinite(found)) and found[3] > 3  # close to ln 64, nothing broke
    assert text.count("Step 3 trained nothing") == 1 and "1 of 4 steps trained nothing" in text
