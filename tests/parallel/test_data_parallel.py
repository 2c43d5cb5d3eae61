"""A plan changes no number: two processes with a record each train as one process with both."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
TELECHAT = CHECKOUT / "research" / "telechat2"


@pytest.fixture(scope="module")
def dataset(small_vocab, tmp_path_factory):
    """Two records with very different numbers of trained tokens."""
    folder = tmp_path_factory.mktemp("two_records")
    lines = [
        {"input": "<_user>你好", "output": "好"},
        {"input": "<_user>什么？", "output": "zq xj kv wp " * 3},
    ]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    subprocess.run(
        [
            sys.executable, str(TELECHAT / "telechat_preprocess.py"), "--input_dataset_file", "d.jsonl",
            "--vocab_file_path", str(small_vocab), "--max_length", "40", "--output_path", "data/",
        ],
        cwd=folder, check=True,
    )  # fmt: skip
    counts = json.loads((folder / "data" / "dataset.mindrecord.json").read_text())["counts"]
    assert counts["records"] == 2, "the two conversations must not share a record"
    return folder / "data" / "dataset.mindrecord"


# Dropless: with a capacity, each process drops by that of its own tokens.
CONFIGS = {
    "dense": ["--config", "finetune_telechat_tiny.yaml"],
    "moe": ["--config", "finetune_telechat_tiny_moe.yaml", "--moe_config.capacity_factor", "0"],
}


def words(dataset, *more) -> list[str]:
    return [
        "python", str(CHECKOUT / "run_mindformer.py"),
        "--train_dataset", str(dataset), "--runner_config.epochs", "4", "--seed", "1",
        "--model.model_config.seq_length", "40", "--train_dataset.data_loader.shuffle", "False", "--verbose",
        *more,
    ]  # fmt: skip


def numbers(log: str) -> list[tuple[float, float]]:
    """Loss and global gradient norm of every step."""
    return [(float(a), float(b)) for a, b in re.findall(r"loss:\[([\d.]+).*global_norm: \[([\d.]+)", log)]


def reports(log: str) -> list[str]:
    """What every step says of its experts."""
    return re.findall(r"{ step \d+, experts: .* }", log)


def trained_by_one(dataset, kind, folder) -> str:
    """The log of a process that has both records in a batch."""
    command = words(dataset, *CONFIGS[kind], "--batch_size", "2")
    one = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return one.stdout + one.stderr


def launcher(dataset, kind, *arguments) -> list[str]:
    """The launcher's command for processes with a record each."""
    plan = [
        "--batch_size", "1", "--use_parallel", "True", "--parallel.parallel_mode", "0", "--output_dir", "two",
        "--parallel.full_batch", "False", "--parallel_config.data_parallel", "2",
    ]  # fmt: skip
    command = " ".join(words(dataset, *CONFIGS[kind], *plan))
    return ["bash", str(CHECKOUT / "scripts" / "msrun_launcher.sh"), command, *arguments]


@pytest.mark.slow  # three processes that build and compile a model
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_processes_train_as_one(kind, dataset, tmp_path, free_port):
    one = trained_by_one(dataset, kind, tmp_path)
    command = launcher(dataset, kind, "2", free_port, "logs", "True", "120")
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600)
    expected, loads = numbers(one), reports(one)
    assert len(expected) == 4 and expected[0] != expected[3]
    assert len(loads) == (4 if kind == "moe" else 0) and all(
        "dropped choices 0.00%" in load for load in loads
    )
    for rank in (0, 1):
        log = (tmp_path / "logs" / f"worker_{rank}.log").read_text(errors="replace")
        assert numbers(log) == [pytest.approx(pair, rel=1e-6) for pair in expected]
        assert reports(log) == loads


# msrun on a machine that does not have node 0's address; on one that has, it would start a second scheduler.
ELSEWHERE = f"""#!{sys.executable}
from mindspore.parallel.cluster.process_entity import _api
from mindspore.parallel.cluster.run import main
_api._is_local_ip = lambda address: False
main()
"""


@pytest.mark.slow
def test_two_nodes_train_as_one(dataset, tmp_path, free_port):
    """The README's form for several nodes: a launcher on each, alike but for the rank."""
    one = trained_by_one(dataset, "dense", tmp_path)
    nodes = []
    for node in ("0", "1"):
        folder = tmp_path / f"node_{node}"
        folder.mkdir()
        environment = dict(os.environ)
        if node == "1":
            (folder / "msrun").write_text(ELSEWHERE)
            (folder / "msrun").chmod(0o755)
            environment["PATH"] = f"{folder}:{environment['PATH']}"
        command = launcher(dataset, "dense", "2", "1", "127.0.0.1", free_port, node, "logs", "True", "300")
        nodes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL))
    try:
        assert [node.wait(600) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.terminate()
    expected = numbers(one)
    assert len(expected) == 4
    for rank in (0, 1):
        logs = tmp_path / f"node_{rank}" / "logs"
        assert [path.name for path in logs.glob("worker_*.log")] == [f"worker_{rank}.log"]
        assert (logs / "scheduler.log").exists() == (rank == 0)
        log = (logs / f"worker_{rank}.log").read_text(errors="replace")
        assert numbers(log) == [pytest.approx(pair, rel=1e-6) for pair in expected]
