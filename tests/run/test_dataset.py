"""A data set is held against the model before either is loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

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
    assert "sequences of 32 tokens, fewer than the model's seq_length of 64" in capsys.readouterr().out
    with pytest.raises(ValueError, match="records of 33 ids, .* but the model's seq_length is 31"):
        check_dataset(settings(records, seq_length=31), "train")
    with pytest.raises(
        ValueError, match="needs a vocabulary of 600 tokens, but the model's vocab_size is 599"
    ):
        check_dataset(settings(records, vocab_size=599), "train")
    check_dataset(settings(records, vocab_size=None), "train")
    assert "not compared with the model, whose YAML states no vocab_size" in capsys.readouterr().out


def test_the_manifest_says_what_the_first_record_may_not_show(records, tmp_path, capsys):
    manifest = {"max_length": LENGTH, "tokenizer": {"vocab_size": 1000}}
    file = copied(records, tmp_path / "data", manifest)
    check_dataset(settings(file, vocab_size=1000), "train")
    assert "without manifest" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs a vocabulary of 1000 tokens"):
        check_dataset(settings(file.parent, vocab_size=999), "train")
    for content, message in (("{", "is not JSON"), ("[1]", "holds a JSON list")):
        (file.parent / "dataset.mindrecord.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            check_dataset(settings(file), "train")


def test_what_an_unfinished_preparation_left_is_not_read(records, tmp_path):
    file = copied(records, tmp_path / "data")
    shutil.copytree(records, tmp_path / "data" / ".new.mindrecord.partial")
    with pytest.raises(ValueError, match=r"\.new\.mindrecord\.partial is of a preparation that is under way"):
        check_dataset(settings(file.parent), "train")
    check_dataset(settings(file), "train")


def test_more_documents_in_a_record_than_the_model_keeps_apart_are_refused(records, tmp_path):
    packed = settings(records)
    middle = [int(i) for i in np.linspace(4, 599, LENGTH + 1).astype(np.int32)[[0, 5, 9]]]
    packed["model"]["model_config"] |= {"document_start_ids": middle, "max_documents": 3}
    check_dataset(packed, "train")
    packed["model"]["model_config"]["max_documents"] = 2
    with pytest.raises(ValueError, match="records of 3 documents, but the model keeps 2 apart"):
        check_dataset(packed, "train")
    packed["model"]["model_config"] |= {
        "document_start_ids": [5],
        "max_documents": 16,
    }  # in the second record
    with pytest.raises(ValueError, match="records of 17 documents, but the model keeps 16 apart"):
        check_dataset(packed, "train")
    said = {"max_length": LENGTH, "tokenizer": {"vocab_size": 600}, "documents_per_record": 129}
    said["document_start_ids"] = [4]
    file = copied(records, tmp_path / "data", said)
    packed = settings(file)
    check_dataset(packed, "train")  # one text, however many conversations are in it
    packed["model"]["model_config"]["document_start_ids"] = [6]
    with pytest.raises(ValueError, match=r"begin with the ids \[4\], but the model's .* is \[6\]"):
        check_dataset(packed, "train")
    packed["model"]["model_config"]["document_start_ids"] = [4]
    with pytest.raises(ValueError, match="records of 129 documents, but the model keeps 128 apart"):
        check_dataset(packed, "train")


def test_a_manifest_of_other_data_is_named(records, tmp_path):
    file = copied(records, tmp_path / "data", {"files": [{"name": "dataset.mindrecord", "records": 3}]})
    with pytest.raises(ValueError, match="holds 2 records, but its manifest .* says 3"):
        check_dataset(settings(file), "train")


def test_columns_that_the_model_does_not_take_are_named(records):
    config = settings(records)
    for columns in (["labels", "input_ids"], ["input_ids", "attention_mask"]):
        config["train_dataset"]["input_columns"] = columns
        with pytest.raises(
            ValueError, match=f"input_columns is .*{columns[0]}.*{columns[1]}.* but the model"
        ):
            check_dataset(config, "train")
    config["train_dataset"] |= {"input_columns": ["input_ids", "labels"], "eod_reset": True}
    with pytest.raises(ValueError, match="eod_reset is True"):
        check_dataset(config, "train")


def test_a_file_without_labels_is_named(tmp_path):
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(tmp_path / "ids.mindrecord"), 1)
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "x")
    writer.write_raw_data([{"input_ids": np.arange(4, 4 + LENGTH + 1, dtype=np.int32)}])
    writer.commit()
    with pytest.raises(ValueError, match="has the columns input_ids, but none named labels"):
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
    with pytest.raises(ValueError, match="sequences of 32 tokens, which this plan cannot split"):
        check_dataset(config, "train")


def test_data_that_cannot_be_read_is_refused(records, tmp_path):
    no_index = copied(records, tmp_path / "no_index")
    (no_index.parent / "dataset.mindrecord.db").unlink()
    with pytest.raises(ValueError, match=r"has no index dataset\.mindrecord\.db beside it"):
        check_dataset(settings(no_index.parent), "train")
    short = copied(records, tmp_path / "short")
    short.write_bytes(short.read_bytes()[:3000])
    with pytest.raises(ValueError, match="is not readable as MindRecord"):
        check_dataset(settings(short), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no .mindrecord file; give --eval_dataset_dir"):
        check_dataset({"eval_dataset": settings(tmp_path / "empty")["train_dataset"]}, "eval")
    with pytest.raises(ValueError, match="there is no data set .*nowhere"):
        check_dataset(settings(tmp_path / "nowhere"), "train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"run_mode": "eval"}, "no data: give --eval_dataset_dir"),
        ({"use_parallel": True}, "Give --parallel.parallel_mode 0 --parallel.full_batch False"),
        ({"use_parallel": True, "parallel.parallel_mode": 0}, "this is a single process"),
        (
            {"runner_config.gradient_accumulation_steps": 2},
            "gradient_accumulation_steps is 2, .*batch_size higher",
        ),
        (
            {"runner_config.gradient_accumulation_steps": 2, "use_parallel": True}
            | {"parallel_config.pipeline_stage": 2, "context.device_target": "Ascend"},
            "micro_batch_num is 1, less than pipeline_stage 2",
        ),
        ({"model.model_config.seq_length": 31}, "the model's seq_length is 31"),
    ],
)
def test_runs_that_would_fail_later_are_refused_at_once(records, tmp_path, monkeypatch, overrides, message):
    for variable in ("LOCAL_DEFAULT_PATH", "REGISTER_PATH", "OM_MODULES_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))  # set by run, restored by monkeypatch
    monkeypatch.delenv("MS_ROLE", raising=False)
    data = {"train_dataset.data_loader.dataset_dir": str(records), "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        run("finetune_telechat_tiny.yaml", data | overrides)


def test_failures_of_mindspore_become_sentences():
    from research.telechat2.compat.library import naming_data, naming_target

    with (
        pytest.raises(ValueError, match="context.device_target is Ascend, but MindSpore cannot use it here"),
        naming_target("Ascend"),
    ):
        raise RuntimeError("Unsupported device target Ascend.\nand more")
    with (
        pytest.raises(ValueError, match="the data set cannot be read: .ERROR. Failed to read"),
        naming_data(),
    ):
        raise RuntimeError("Exception thrown from dataset pipeline.\n---\n[ERROR] Failed to read file.\n---")
    with pytest.raises(RuntimeError, match="a defect"), naming_data():
        raise RuntimeError("a defect")
