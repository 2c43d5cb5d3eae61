"""A data set is held against the model before either is loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusal import refused

from research.telechat2.config.yaml_files import read_config, resolve_config
from research.telechat2.run.dataset import check_dataset
from research.telechat2.run.task import run

LENGTH = 32  # records hold one id more


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A folder with one MindRecord file without manifest, whose largest id is 599."""
    from mindspore.mindrecord import FileWriter

    file = tmp_path_factory.mktemp("records") / "dataset.mindrecord"
    writer = FileWriter(str(file), 1)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}, "x")
    row = np.linspace(4, 599, LENGTH + 1).astype(np.int32)
    packed = row.copy()
    packed[1::2] = 5
    writer.write_raw_data([{"input_ids": ids, "labels": ids} for ids in (row, packed)])
    writer.commit()
    return file.parent


def settings(path, seq_length=LENGTH, vocab_size=600) -> dict:
    return {
        "train_dataset": {"data_loader": {"type": "MindDataset", "dataset_dir": str(path)}},
        "model": {"model_config": {"seq_length": seq_length, "vocab_size": vocab_size}},
    }


def copied(records, folder, manifest=None):
    shutil.copytree(records, folder)
    if manifest is not None:
        (folder / "dataset.mindrecord.json").write_text(json.dumps(manifest))
    return folder / "dataset.mindrecord"


def test_data_without_manifest_is_compared_by_its_records(records, capsys):
    check_dataset(settings(records), "train")
    assert "1 of them without manifest), 2 records of 33 ids, all checked" in capsys.readouterr().out
    check_dataset(settings(records / "dataset.mindrecord", seq_length=64), "train")
    assert "sequences of 32 tokens, fewer than seq_length 64" in capsys.readouterr().out
    with refused(33, 31):
        check_dataset(settings(records, seq_length=31), "train")
    with refused(600, 599):
        check_dataset(settings(records, vocab_size=599), "train")
    check_dataset(settings(records, vocab_size=None), "train")
    assert "not compared with the model, whose YAML states no vocab_size" in capsys.readouterr().out


def test_the_manifest_says_what_the_first_record_may_not_show(records, tmp_path, capsys):
    manifest = {"max_length": LENGTH, "tokenizer": {"vocab_size": 1000}}
    file = copied(records, tmp_path / "data", manifest)
    check_dataset(settings(file, vocab_size=1000), "train")
    assert "without manifest" not in capsys.readouterr().out
    with refused(1000):
        check_dataset(settings(file.parent, vocab_size=999), "train")
    for content in ("{", "[1]"):
        (file.parent / "dataset.mindrecord.json").write_text(content)
        with refused("dataset.mindrecord.json"):
            check_dataset(settings(file), "train")


def test_what_an_unfinished_preparation_left_is_not_read(records, tmp_path):
    file = copied(records, tmp_path / "data")
    shutil.copytree(records, tmp_path / "data" / ".new.mindrecord.partial")
    with refused(".new.mindrecord.partial", "--resume"):
        check_dataset(settings(file.parent), "train")
    check_dataset(settings(file), "train")


def test_more_documents_in_a_record_than_the_model_keeps_apart_are_refused(records, tmp_path):
    packed = settings(records)
    middle = [int(i) for i in np.linspace(4, 599, LENGTH + 1).astype(np.int32)[[0, 5, 9]]]
    packed["model"]["model_config"] |= {"document_start_ids": middle, "max_documents": 3}
    check_dataset(packed, "train")
    packed["model"]["model_config"]["max_documents"] = 2
    with refused("3 documents", "max_documents 3"):
        check_dataset(packed, "train")
    packed["model"]["model_config"] |= {
        "document_start_ids": [5],
        "max_documents": 16,
    }  # in the second record
    with refused("17 documents", "max_documents 17"):
        check_dataset(packed, "train")
    said = {"max_length": LENGTH, "tokenizer": {"vocab_size": 600}, "documents_per_record": 129}
    said["document_start_ids"] = [4]
    file = copied(records, tmp_path / "data", said)
    packed = settings(file)
    check_dataset(packed, "train")  # one text, however many conversations are in it
    packed["model"]["model_config"]["document_start_ids"] = [6]
    with refused([4], [6], "document_start_ids"):
        check_dataset(packed, "train")
    packed["model"]["model_config"]["document_start_ids"] = [4]
    with refused("129 documents", 128):
        check_dataset(packed, "train")


def test_a_manifest_of_other_data_is_named(records, tmp_path):
    file = copied(records, tmp_path / "data", {"files": [{"name": "dataset.mindrecord", "records": 3}]})
    with refused("2 records", file, 3):
        check_dataset(settings(file), "train")


def test_columns_that_the_model_does_not_take_are_named(records):
    config = settings(records)
    for columns in (["labels", "input_ids"], ["input_ids", "attention_mask"]):
        config["train_dataset"]["input_columns"] = columns
        with refused("train_dataset.input_columns", columns):
            check_dataset(config, "train")
    config["train_dataset"] |= {"input_columns": ["input_ids", "labels"], "eod_reset": True}
    with refused("eod_reset is True"):
        check_dataset(config, "train")


def test_a_file_without_labels_is_named(tmp_path):
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(tmp_path / "ids.mindrecord"), 1)
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "x")
    writer.write_raw_data([{"input_ids": np.arange(4, 4 + LENGTH + 1, dtype=np.int32)}])
    writer.commit()
    with refused("input_ids", "labels"):
        check_dataset(settings(tmp_path), "train")
    alone = settings(tmp_path)
    alone["train_dataset"]["input_columns"] = ["input_ids"]
    check_dataset(alone, "train")


def test_records_that_a_plan_cannot_split_are_refused(records, capsys):
    """Sequences of 32 tokens, each split over 64 devices by sequence parallelism."""
    config = read_config(resolve_config("finetune_telechat_7b_32k", Path.cwd()))
    config["train_dataset"]["data_loader"]["dataset_dir"] = str(records)
    config["model"]["model_config"] |= {"num_heads": 64, "hidden_size": 4096}
    config["parallel_config"] |= {"data_parallel": 1, "model_parallel": 64}
    with refused("32 tokens", "--max_length"):
        check_dataset(config, "train")


def test_data_that_cannot_be_read_is_refused(records, tmp_path):
    no_index = copied(records, tmp_path / "no_index")
    (no_index.parent / "dataset.mindrecord.db").unlink()
    with refused("dataset.mindrecord.db"):
        check_dataset(settings(no_index.parent), "train")
    short = copied(records, tmp_path / "short")
    short.write_bytes(short.read_bytes()[:3000])
    with refused(short):
        check_dataset(settings(short), "train")
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty", "--eval_dataset_dir"):
        check_dataset({"eval_dataset": settings(tmp_path / "empty")["train_dataset"]}, "eval")
    with refused(tmp_path / "nowhere", "--train_dataset_dir"):
        check_dataset(settings(tmp_path / "nowhere"), "train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"run_mode": "eval"}, ["--eval_dataset_dir"]),
        ({"use_parallel": True}, ["--parallel.parallel_mode 0", "--parallel.full_batch False"]),
        ({"use_parallel": True, "parallel.parallel_mode": 0}, ["msrun_launcher.sh"]),
        (
            {"runner_config.gradient_accumulation_steps": 2},
            ["gradient_accumulation_steps is 2", "batch_size"],
        ),
        (
            {"runner_config.gradient_accumulation_steps": 2, "use_parallel": True}
            | {"parallel_config.pipeline_stage": 2, "context.device_target": "Ascend"},
            ["micro_batch_num is 1", "pipeline_stage 2"],
        ),
        ({"model.model_config.seq_length": 31}, ["seq_length", 31]),
    ],
)
def test_runs_that_would_fail_later_are_refused_at_once(records, tmp_path, monkeypatch, overrides, message):
    for variable in ("LOCAL_DEFAULT_PATH", "REGISTER_PATH", "OM_MODULES_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))  # set by run, restored by monkeypatch
    monkeypatch.delenv("MS_ROLE", raising=False)
    data = {"train_dataset.data_loader.dataset_dir": str(records), "output_dir": str(tmp_path)}
    with refused(*message):
        run("finetune_telechat_tiny.yaml", data | overrides)


def test_failures_of_mindspore_become_sentences():
    from research.telechat2.compat.library import naming_data, naming_target

    with (
        refused("context.device_target", "Ascend"),
        naming_target("Ascend"),
    ):
        raise RuntimeError("Unsupported device target Ascend.\nand more")
    with (
        refused("Failed to read"),
        naming_data(),
    ):
        raise RuntimeError("Exception thrown from dataset pipeline.\n---\n[ERROR] Failed to read file.\n---")
    with pytest.raises(RuntimeError, match="a defect"), naming_data():
        raise RuntimeError("a defect")
