"""Evaluation counts every record once, in equal batches, by however many processes; its settings fit."""

import math
import re
import subprocess

import numpy as np
import pytest
from refusal import refused
from small_model import SIZES, write_weights

from research.telechat2.config.evaluation import check_evaluation_settings, prepare_evaluation
from research.telechat2.config.yaml_files import CHECKOUT, SHIPPED, read_config

IGNORED = -100
LENGTH = 12  # records hold one id more


def write_records(file, rows, columns=("input_ids", "labels")):
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(file), 1)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in columns}, "x")
    writer.write_raw_data([dict(zip(columns, row, strict=True)) for row in rows])
    writer.commit()
    return file


def rows(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Records whose first id is their number, with 1, 2, 3, … trained tokens."""
    ids = np.random.default_rng(0).integers(50, 600, (count, LENGTH + 1)).astype(np.int32)
    ids[:, 0] = np.arange(count)
    labels = np.full_like(ids, IGNORED)
    for number in range(count):
        labels[number, -1 - number % LENGTH :] = ids[number, -1 - number % LENGTH :]
    return list(zip(ids, labels, strict=True))


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five records in two files, and in a third one the ids alone."""
    folder = tmp_path_factory.mktemp("five")
    found = rows(5)
    write_records(folder / "a.mindrecord", found[:2])
    write_records(folder / "b.mindrecord", found[2:])
    write_records(folder / "ids.mindrecord", [(ids,) for ids, _ in found], ["input_ids"])
    return folder


def batches(files, *arguments, **more):
    from research.telechat2.run.evaluation_data import evaluation_dataset

    data, _, count = evaluation_dataset(files, *arguments, **more)
    read = list(data.create_tuple_iterator(num_epochs=1, output_numpy=True))
    assert len(read) == count == data.get_dataset_size()
    return read


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_every_record_is_trained_once_in_equal_batches(five, batch_size, shards):
    files = [five / "a.mindrecord", five / "b.mindrecord"]
    shared = [batches(files, batch_size, (number, shards)) for number in range(shards)]
    assert len({len(read) for read in shared}) == 1
    seen = []
    for ids, labels in (batch for read in shared for batch in read):
        assert ids.shape == labels.shape == (batch_size, LENGTH + 1) and ids.dtype == labels.dtype == np.int32
        seen += [(row, label) for row, label in zip(ids, labels, strict=True) if (label != IGNORED).any()]
    seen.sort(key=lambda record: record[0][0])
    np.testing.assert_array_equal(seen, rows(5))


def test_a_number_of_samples_is_of_all_processes_together(five):
    files = [five / "a.mindrecord", five / "b.mindrecord"]
    read = [batch for number in range(2) for batch in batches(files, 1, (number, 2), num_samples=3)]
    trained = [int(ids[0, 0]) for ids, labels in read if (labels != IGNORED).any()]
    assert sorted(trained) == [0, 1, 2] and len(read) == 4


def test_ids_without_labels_are_trained_but_for_padding(five):
    read = batches([five / "ids.mindrecord"], 2, pad=3, ignored=-7)
    assert len(read) == 3
    for number, (ids, labels) in enumerate(read):
        expected = np.where(ids == 3, -7, ids)
        if number == 2:
            expected[1] = -7  # the place that no record fills
        np.testing.assert_array_equal(labels, expected)


def yaml(size: str, **changes) -> dict:
    """A cluster's YAML with weights to evaluate."""
    config = read_config(
        CHECKOUT / SHIPPED / f"telechat2-{size}" / f"finetune_telechat_{size.replace('-', '_')}.yaml"
    )
    return config | {"run_mode": "eval", "load_checkpoint": "weights"} | changes


def test_a_cluster_evaluates_with_one_run_of_layers_in_a_stage_and_a_legal_compiler(capsys):
    config = yaml("115b")
    prepare_evaluation(config, training=False)
    model = config["model"]["model_config"]
    # 4 layers of 3 runs in 8 stages, and the YAML's offsets added up
    assert model["pp_interleave_num"] == 1 and model["offset"] == [-2, -1, 0, 1, 1, 1, 1, -1]
    assert config["parallel"]["pipeline_config"]["pipeline_interleave"] is False
    assert config["context"]["jit_config"]["jit_level"] == "O0"  # MindFormers refuses O1
    said = capsys.readouterr().out
    assert "[10, 11, 12, 13, 13, 13, 13, 11]" in said and "O0 instead of O1" in said
    with refused("pp_interleave_num 3"):
        prepare_evaluation(yaml("115b"), training=True)


def test_experts_that_are_split_cannot_answer_every_token():
    prepare_evaluation(yaml("39b-a12b"), training=True)
    split = yaml("39b-a12b")
    split["moe_config"]["ep_extend_tp"] = False
    with refused("model_parallel 4"):
        prepare_evaluation(split, training=False)
    split["parallel_config"]["model_parallel"] = 1
    prepare_evaluation(split, training=False)


@pytest.mark.parametrize(
    ("metric", "fits"),
    [
        ({"type": "PerplexityMetric"}, True),
        ([{"type": "PerplexityMetric"}], True),
        (None, True),
        ({"type": "EmF1Metric"}, False),
    ],
)
def test_the_metric_of_older_yamls_is_replaced_and_others_are_refused(metric, fits, capsys):
    config = yaml("7b", metric=metric)
    if not fits:
        with refused("EmF1Metric"):
            prepare_evaluation(config, training=False)
        return
    prepare_evaluation(config, training=False)
    assert config["metric"]["type"] == "TelechatPerplexity"
    assert "metric: TelechatPerplexity instead of" in capsys.readouterr().out


def test_random_weights_are_not_evaluated_but_trained_ones_are_between_steps():
    with refused("--load_checkpoint"):
        prepare_evaluation(yaml("7b", load_checkpoint=""), training=False)
    prepare_evaluation(yaml("7b", load_checkpoint=""), training=True)


def test_what_an_evaluation_would_pass_over_is_refused():
    config = yaml("tiny", resume_training=True)
    (note,) = check_evaluation_settings(config, {})
    assert config["resume_training"] is False and "resume_training" in note
    with refused("--eval_dataset.data_loader.num_samples 5"):
        check_evaluation_settings(config, {"train_dataset.data_loader.num_samples": 5})
    for changes, told in (({"seed": -5}, "seed is -5"), ({"runner_config": {"batch_size": 0}}, "size is 0")):
        with refused(told):
            check_evaluation_settings(config | changes, {})


def words(folder, *more) -> list[str]:
    sizes = [word for name, size in SIZES.items() for word in (f"--model.model_config.{name}", str(size))]
    return [
        "python", str(CHECKOUT / "run_mindformer.py"), "--config", "finetune_telechat_tiny.yaml",
        "--run_mode", "eval", "--eval_dataset_dir", str(folder / "data"), "--load_checkpoint",
        str(folder / "ms"), "--model.model_config.seq_length", str(LENGTH), *sizes, "--verbose", *more,
    ]  # fmt: skip


def result(log: str) -> tuple[float, int]:
    """The metric as MindFormers logs it, in full."""
    loss, tokens = re.search(r"'loss': ([\d.]+), 'PPL': [\d.]+, 'tokens': (\d+)", log).groups()
    return float(loss), int(tokens)


@pytest.mark.slow  # four processes that build and compile a model
def test_two_processes_evaluate_as_one(tmp_path, free_port):
    write_weights(tmp_path)
    (tmp_path / "data").mkdir()
    write_records(tmp_path / "data" / "d.mindrecord", rows(5))
    one = subprocess.run(
        words(tmp_path, "--batch_size", "2"), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    plan = ["--use_parallel", "True", "--parallel.parallel_mode", "0", "--parallel.full_batch", "False"]
    command = " ".join(words(tmp_path, "--batch_size", "1", "--output_dir", "two", *plan))
    launcher = ["bash", str(CHECKOUT / "scripts" / "msrun_launcher.sh"), command]
    subprocess.run([*launcher, "2", free_port, "logs", "True", "120"], cwd=tmp_path, check=True, timeout=600)
    loss, tokens = result(one.stdout + one.stderr)
    assert tokens == 1 + 2 + 3 + 4 + 5 and loss == pytest.approx(math.log(600), rel=0.1)
    for rank in (0, 1):
        found = result((tmp_path / "logs" / f"worker_{rank}.log").read_text(errors="replace"))
        assert found == (pytest.approx(loss, rel=1e-6), tokens)
