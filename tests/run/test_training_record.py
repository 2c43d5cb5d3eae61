"""What is kept of a training beside its checkpoints: records, hash, batch and steps of an epoch."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from research.telechat2.run import records
from research.telechat2.run.records import count_records, fingerprint
from research.telechat2.run.steps import global_batch_size, steps_per_epoch
from research.telechat2.run.training_record import describe_training


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> list[Path]:
    """Two MindRecord files of 5 and 2 records."""
    from mindspore.mindrecord import FileWriter

    files = []
    for number, count in enumerate((5, 2)):
        file = tmp_path_factory.mktemp("data") / f"{number}.mindrecord"
        writer = FileWriter(str(file), 1)
        writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "records")
        writer.write_raw_data([{"input_ids": np.full(9, row, np.int32)} for row in range(count)])
        writer.commit()
        files.append(file)
    return files


def test_records_are_counted_and_contents_compared(dataset, tmp_path):
    assert [count_records(file) for file in dataset] == [5, 2]
    for file in dataset[:1]:
        for suffix in ("", ".db"):
            shutil.copy(f"{file}{suffix}", f"{tmp_path / 'renamed.mindrecord'}{suffix}")
    renamed = tmp_path / "renamed.mindrecord"
    assert fingerprint([renamed]) == fingerprint(dataset[:1]) != fingerprint(dataset[1:])
    assert fingerprint(dataset) != fingerprint(dataset[::-1])  # the order of files is that of their records
    with open(renamed, "r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    assert fingerprint([renamed]) != fingerprint(dataset[:1])
    (tmp_path / "renamed.mindrecord.db").write_bytes(b"no index")
    assert count_records(renamed) is None


def test_large_files_are_compared_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_WHOLE_BYTES", 64)
    monkeypatch.setattr(records, "_BLOCK_BYTES", 16)
    file = tmp_path / "large"
    file.write_bytes(bytes(range(200)))
    before = fingerprint([file])
    for position, seen in ((0, True), (199, True), (20, False)):  # four blocks of 16 bytes
        content = bytearray(range(200))
        content[position] ^= 255
        file.write_bytes(content)
        assert (fingerprint([file]) != before) is seen


def settings(**changes) -> dict:
    return {"runner_config": {"batch_size": 2, "epochs": 3, "sink_mode": False}} | changes


@pytest.mark.parametrize(
    ("changes", "devices", "batch", "steps"),
    [
        ({}, 1, 2, 3),
        ({"train_dataset": {"drop_remainder": False}}, 1, 2, 4),
        ({"train_dataset": {"repeat": 2}}, 1, 2, 6),
        ({"train_dataset": {"data_loader": {"num_samples": 5}}}, 1, 2, 2),
        ({"train_dataset": {"data_loader": {"num_samples": 99}}}, 1, 2, 3),
        ({"train_dataset": {"dynamic_batch": True}}, 1, 2, None),
        ({"use_parallel": True, "parallel": {"parallel_mode": 0}}, 2, 4, 2),  # 4 records each, padded
        ({"use_parallel": True, "parallel_config": {"data_parallel": 3}}, 6, 6, 1),
        (
            {
                "use_parallel": True,
                "parallel_config": {"data_parallel": 1, "pipeline_stage": 2, "micro_batch_num": 3},
            },
            2, 6, 1,
        ),
        ({"use_parallel": True, "parallel": {"full_batch": False}}, 2, 2, None),
    ],
)  # fmt: skip
def test_the_batch_and_the_steps_of_an_epoch_are_mindformers(changes, devices, batch, steps):
    config = settings(**changes)
    assert global_batch_size(config, devices) == batch
    assert steps_per_epoch(config, 7, batch, devices) == steps


def test_a_run_is_described_from_its_settings_and_data(dataset):
    files = {file: count_records(file) for file in dataset}
    record = describe_training(settings(seed=3, context={"device_target": "CPU"}), files)
    assert (record.records, record.steps_per_epoch, record.epochs, record.total_steps) == (7, 3, 3, 9)
    assert (record.seed, record.sink_size, record.devices) == (3, 0, 1)
    assert record.others["model_config.theta"] == 10000.0  # a default
    changed = settings(
        model={"model_config": {"theta": 2e4, "use_past": True}}, runner_wrapper={"max_grad_norm": 2.0}
    )
    others = describe_training(changed, {}).others
    assert {key: value for key, value in others.items() if record.others.get(key) != value} == {
        "model_config.theta": 2e4,
        "runner_wrapper.max_grad_norm": 2.0,
    }
    sinking = settings(context={"device_target": "Ascend"})
    sinking["runner_config"] |= {"sink_mode": True, "sink_size": 2}
    # 3 epochs of 3 steps are 9; MindFormers trains int(3 / 2 * 3) = 4 sinks of 2
    assert describe_training(sinking, files).total_steps == 8
    sinking["runner_config"]["sink_size"] = -1
    assert describe_training(sinking, files).sink_size == 3
    assert describe_training(settings(), {}).total_steps is None
