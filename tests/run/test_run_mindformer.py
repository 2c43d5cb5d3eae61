"""run_mindformer.py on a CPU, as a user runs it: trains, resumes, predicts, and says what is wrong."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import load_llama
from refusal import refused
from small_model import SIZES, write_weights

from research.telechat2.checkpoint.convert_layout import convert_layout
from research.telechat2.run.task import run

CHECKOUT = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("finetune_telechat_tiny.yaml", {}, ["--train_dataset_dir"]),
        (
            "finetune_telechat_tiny.yaml",
            {"train_dataset.data_loader.dataset_dir": "nowhere"},
            ["nowhere"],
        ),
        (
            "finetune_telechat_tiny.yaml",
            {"load_checkpoint": "a", "checkpoint.load_path": "b"},
            ["load_checkpoint is a", "checkpoint.load_path is b"],
        ),
        ("finetune_telechat_tiny.yaml", {"output_dir": __file__}, ["output_dir", __file__]),
        (
            "predict_telechat_tiny.yaml",
            {"train_dataset.data_loader.dataset_dir": "a"},
            ["`train_dataset.data_loader`", "finetune_"],
        ),
        ("predict_telechat_tiny.yaml", {}, ["--predict_data"]),
        ("predict_telechat_tiny.yaml", {"run_mode": "finetune"}, ["train_dataset"]),
        ("predict_telechat_tiny.yaml", {"context.mode": 1}, ["context.mode"]),
        ("predict_telechat_tiny.yaml", {"run_mode": "dance"}, ["run_mode is 'dance'"]),
        (
            "finetune_telechat_tiny.yaml",
            {"checkpoint.save_interleaved_step": 5},
            ["checkpoint.save_interleaved_step", "save_interleaved_steps"],
        ),
    ],
)
def test_tasks_that_cannot_start_are_refused_at_once(tmp_path, monkeypatch, name, overrides, message):
    monkeypatch.chdir(tmp_path)
    for variable in ("LOCAL_DEFAULT_PATH", "REGISTER_PATH", "OM_MODULES_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))  # set by run, restored by monkeypatch
    monkeypatch.setattr(sys, "path", list(sys.path))
    with refused(*message):
        run(name, overrides)
    assert not any(tmp_path.iterdir())


def start(cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """Run run_mindformer.py in ``cwd`` as a user would: no PYTHONPATH, nothing set up."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "REGISTER_PATH")
    }
    command = [sys.executable, str(CHECKOUT / "run_mindformer.py"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_mistakes_end_in_a_sentence_and_no_traceback(tmp_path):
    wrong = start(tmp_path, "--config", "finetune_telechat_tni.yaml")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert (
        wrong.stderr.startswith("error: there is no config") and "finetune_telechat_tiny.yaml" in wrong.stderr
    )
    wrong = start(tmp_path, "--config", "finetune_telechat_tiny.yaml", "--use_parallel", "perhaps")
    assert wrong.returncode == 2 and "expected True or False, got 'perhaps'" in wrong.stderr
    wrong = start(tmp_path, "--config", "finetune_telechat_tiny.yaml", "--modal_type", "image")
    assert wrong.returncode == 2 and "read text only" in wrong.stderr
    wrong = start(tmp_path, "--config", "finetune_telechat_tiny.yaml", "--trust_remote_code", "True")
    assert wrong.returncode == 2 and "no code is downloaded" in wrong.stderr
    assert not any(tmp_path.iterdir())


LOSS = re.compile(r"step:\[\s*(\d+)/\s*\d+\], loss:\[([\d.]+)/")


def losses(result: subprocess.CompletedProcess) -> dict[int, str]:
    """What MFLossMonitor prints, in the output of a run with --verbose."""
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return {int(step): loss for step, loss in LOSS.findall(result.stdout + result.stderr)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Twelve records of random ids, whose manifest says that they are in the README's prompt format."""
    from mindspore.mindrecord import FileWriter

    file = tmp_path_factory.mktemp("data") / "dataset.mindrecord"
    schema = {name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}
    ids = np.random.default_rng(0).integers(4, SIZES["vocab_size"], (12, SEQ_LENGTH + 1)).astype(np.int32)
    writer = FileWriter(str(file), 1)
    writer.add_schema(schema, "records")
    writer.write_raw_data([{"input_ids": row, "labels": row} for row in ids])
    writer.commit()
    (file.parent / f"{file.name}.json").write_text(json.dumps({"prompt_format": "plain"}))
    return file


def size_words(**more) -> list[str]:
    return [
        word
        for key, value in (SIZES | {"seq_length": SEQ_LENGTH} | more).items()
        for word in (f"--model.model_config.{key}", str(value))
    ]


def finetune_words(dataset: Path) -> list[str]:
    # --train_dataset is the README's spelling; argparse completes it
    words = ["--config", "research/telechat2/finetune_telechat_tiny.yaml", "--train_dataset", str(dataset)]
    words += ["--register_path", "./research/telechat2", "--use_parallel", "False", "--batch_size", "2"]
    words += ["--epochs", "1", "--checkpoint.save_interleaved_steps", "3", "--verbose"]
    return words + size_words()


def without(words: list[str], word: str) -> list[str]:
    return [other for other in words if other != word]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset, weights) -> tuple[Path, dict[int, str]]:
    """The folder of a finished run of six steps from a Hugging Face folder, and its losses."""
    cwd = tmp_path_factory.mktemp("trained it's")  # a path that a shell needs quotes for
    words = without(finetune_words(dataset), "--verbose")
    told = start(cwd, *words, "--load_checkpoint", str(weights.parent / "torch"))
    (cwd / "told.txt").write_text(told.stdout + told.stderr)
    assert told.returncode == 0, (told.stdout + told.stderr)[-3000:]
    log = (cwd / "output" / "log" / "run.log").read_text(encoding="utf-8")
    return cwd, {int(step): loss for step, loss in LOSS.findall(log)}


def test_the_screen_has_the_runs_own_lines_and_the_log_all(trained):
    cwd, found = trained
    told = (cwd / "told.txt").read_text()
    lines = told.splitlines()
    assert "mindformers/" not in told and len(lines) < 40, told
    first, *_, last = (line for line in lines if re.match(r"step \d+/6  ", line))
    assert f"loss {float(found[1]):.4f}" in first
    assert f"step 6/6  loss {float(found[6]):.4f}" in last
    assert re.search(r"lr [\d.e-]+  [\d.]+ s/step  0:00:00 left", last)
    log = (cwd / "output" / "log" / "run.log").read_text(encoding="utf-8")
    assert "'runner_wrapper'" in log and "Starting Training Model" in log  # a config, and a library's note
    assert last in log and log.count("\n") > 300


def test_the_metrics_hold_every_step(trained):
    cwd, found = trained
    steps = [json.loads(line) for line in (cwd / "output" / "metrics.jsonl").read_text().splitlines()]
    assert {step["step"]: f"{step['loss']:.6f}" for step in steps} == found
    log = (cwd / "output" / "log" / "run.log").read_text(encoding="utf-8")
    rates = [float(rate) for rate in re.findall(r"lr: ([\d.e-]+),", log)]
    assert [step["learning_rate"] for step in steps] == pytest.approx(rates, rel=1e-5)
    assert (cwd / "output" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_to_type_next_runs_as_pasted(trained, tmp_path):
    """The sizes came from the command line, so that no predict YAML fits: it is the evaluation."""
    cwd, _ = trained
    lines = (cwd / "told.txt").read_text().splitlines()
    command = lines[next(i for i, line in enumerate(lines) if line.startswith("next, ")) + 1]
    told = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr[-3000:]
    assert re.search(r"^evaluation: loss [\d.]+ .* over 384 trained tokens$", told.stdout, re.MULTILINE)
    assert "mindformers/" not in told.stdout + told.stderr


def test_a_run_writes_into_its_output_folder_only(trained):
    cwd, found = trained
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in cwd.iterdir()} - {"told.txt", "output_eval"} == {"output"}
    checkpoint = cwd / "output" / "checkpoint"
    assert json.loads((checkpoint / "prompt_format.json").read_text()) == {"prompt_format": "plain"}
    assert (checkpoint / "iteration_00000006" / "common.json").is_file()


def test_a_hugging_face_folder_is_finetuned_as_it_is(trained, weights, dataset):
    """No conversion before, none written: the first loss is the oracle's of two of the rows."""
    import torch
    from mindspore.mindrecord import FileReader

    ids = torch.tensor(np.stack([row["input_ids"] for row in FileReader(str(dataset)).get_next()])).long()
    with torch.no_grad():
        logits = load_llama(weights.parent / "torch")(ids[:, :-1]).logits
    rows = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    pairs = [float(a + b) / 2 for a, b in itertools.combinations(rows, 2)]
    assert min(abs(float(trained[1][1]) - pair) for pair in pairs) < 2e-6
    written = {"model.safetensors", "config.json"}
    assert {path.name for path in (weights.parent / "torch").iterdir()} == written
    assert not (trained[0] / "output" / "load_checkpoint").exists()


def test_a_resumed_run_continues_with_the_same_losses(trained, dataset, tmp_path):
    cwd, found = trained
    half = cwd / "output" / "checkpoint" / "iteration_00000003"
    words = ["--load_checkpoint", str(half), "--resume_training", "True", "--output_dir", "elsewhere"]
    resumed = losses(start(tmp_path, *finetune_words(dataset), *words))
    assert resumed == {step: loss for step, loss in found.items() if step > 3}
    before, after = (folder / "metrics.jsonl" for folder in (cwd / "output", tmp_path / "elsewhere"))
    curves = [[json.loads(line) for line in file.read_text().splitlines()] for file in (before, after)]
    assert [step["step"] for step in curves[1]] == [1, 2, 3, 4, 5, 6]  # the first three are the first run's
    assert curves[1][:3] == curves[0][:3]
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def predict_words(vocab: Path, *more: str) -> list[str]:
    words = ["--config", "./research/telechat2/predict_telechat_tiny.yaml", "--use_parallel", "False"]
    words += ["--processor.tokenizer.vocab_file", str(vocab), "--register_path", "./research/telechat2"]
    words += ["--verbose"]
    return words + size_words(max_decode_length=SEQ_LENGTH, num_blocks=8) + list(more)


def test_prediction_prints_its_answers_last(trained, small_vocab, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "<_start><_user>生抽与老抽的区别？<_bot>\n<_start><_user>What is it?<_bot>\n", encoding="utf-8"
    )
    checkpoint = str(trained[0] / "output" / "checkpoint")
    words = ["--load_checkpoint", checkpoint, "--predict_data", str(prompts), "--output_dir", "out"]
    result = start(tmp_path, *without(predict_words(small_vocab, *words), "--verbose"))
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    answers = result.stdout.split("answers: also in ", 1)[1].split("\n", 1)[1]
    assert "mindformers/" not in result.stdout and len(result.stdout.splitlines()) < 20
    assert answers.index("生抽与老抽的区别？") < answers.index("What is it?")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]
    assert "iteration_00000006" in result.stdout


@pytest.mark.slow
def test_a_hugging_face_folder_predicts_as_it_is(weights, small_vocab, small_tokenizer, tmp_path):
    """Answers of the oracle, greedy; the prompt is echoed, as MindFormers does."""
    import torch

    prompt = "<_start><_user>What is it?<_bot>"
    ids = small_tokenizer(prompt)["input_ids"]
    words = [
        "--load_checkpoint",
        str(weights.parent / "torch"),
        "--predict_data",
        prompt,
        "--do_sample",
        "False",
    ]
    words += ["--output_dir", "out", "--model.model_config.max_decode_length", str(len(ids) + 6)]
    result = start(tmp_path, *predict_words(small_vocab, *words))
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    answer = load_llama(weights.parent / "torch").generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=6, do_sample=False,
        eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    text = small_tokenizer.decode(answer[0].tolist(), skip_special_tokens=True)
    assert result.stdout.rstrip("\n").endswith(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["file", "folder", "ckpt", "rank", "hugging_face", "joined", "tensor_parallel"]
)
def test_every_kind_of_checkpoint_finetunes_and_predicts(kind, weights, dataset, small_vocab, tmp_path):
    given = {
        "file": weights / "model.safetensors", "folder": weights, "hugging_face": weights.parent / "torch",
        "joined": tmp_path / "joined.safetensors", "tensor_parallel": tmp_path / "ranks",
    }.get(kind)  # fmt: skip
    if kind in ("joined", "tensor_parallel"):
        convert_layout(weights, given, qkv_concat=True, tensor_parallel=2)
    if kind == "ckpt":
        given = tmp_path / "telechat.ckpt"
        code = (
            "import sys, mindspore as ms; weights = ms.load_checkpoint(sys.argv[1], format='safetensors');"
            "ms.save_checkpoint(weights, sys.argv[2])"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(weights / "model.safetensors"), str(given)], check=True
        )
    if kind == "rank":
        given = tmp_path / "rank_0"
        given.mkdir()
        (given / "t_rank_0-1_10.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
    reference = losses(
        start(tmp_path, *finetune_words(dataset), "--load_checkpoint", str(weights), "--output_dir", "r")
    )
    found = losses(
        start(tmp_path, *finetune_words(dataset), "--load_checkpoint", str(given), "--output_dir", "a")
    )
    random = losses(start(tmp_path, *finetune_words(dataset), "--output_dir", "b"))
    assert found == reference != random
    words = ["--load_checkpoint", str(given), "--predict_data", "<_user>hi<_bot>", "--output_dir", "c"]
    assert start(tmp_path, *predict_words(small_vocab, *words)).returncode == 0


@pytest.mark.slow
def test_two_workers_train_data_parallel_on_cpus(weights, dataset, tmp_path, free_port):
    """From a Hugging Face folder, which each reads by itself: the losses of one with both batches."""
    words = finetune_words(dataset) + ["--load_checkpoint", str(weights.parent / "torch")]
    words += ["--use_parallel", "True", "--batch_size", "1", "--parallel.parallel_mode", "0"]
    words += ["--parallel.full_batch", "False", "--parallel_config.data_parallel", "2"]
    command = shlex.join(["python", str(CHECKOUT / "run_mindformer.py"), *words])
    launcher = ["bash", str(CHECKOUT / "scripts" / "msrun_launcher.sh"), command]
    launcher += ["2", free_port, "logs", "True", "120"]
    result = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    found = losses(result)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    words = ["--load_checkpoint", str(weights.parent / "torch"), "--output_dir", "alone"]
    alone = losses(start(tmp_path, *finetune_words(dataset), *words))
    assert [float(found[step]) for step in (1, 2)] == pytest.approx(
        [float(alone[step]) for step in (1, 2)], abs=2e-5
    )
    saved = [path.name for path in (tmp_path / "output" / "checkpoint").rglob("*.safetensors")]
    assert sorted(saved) == [
        f"telechat2_rank_{rank}-1_{step}.safetensors" for rank in (0, 1) for step in (3, 6)
    ]
