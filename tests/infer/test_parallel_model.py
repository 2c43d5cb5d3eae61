"""Processes that share a model answer as the oracle does: dense and MoE, rows joined or not."""

import json
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from infer_process import answers
from model_fixtures import RandomModel, prompts

SEQ_LENGTH, VOCAB, NEW_TOKENS = 48, 256, 8
MODELS = {  # kv heads (of 4), and what else config.json says
    "mha": {"hidden_size": 64},
    "gqa": {"hidden_size": 128, "num_key_value_heads": 2},
    "moe": {"hidden_size": 64, "num_experts": 5, "num_experts_per_tok": 2, "tied": True},
}
RUNS = [  # model, qkv_concat, number of processes
    ("gqa", True, 1),
    ("mha", True, 2),
    ("gqa", False, 2),
    ("moe", False, 2),
]
SLOW_RUNS = [
    ("mha", False, 1),
    ("moe", True, 1),
    ("gqa", True, 2),
    ("mha", False, 4),
    ("mha", True, 4),
    ("moe", False, 4),
    ("moe", True, 4),
]


def run_id(run) -> str:
    model, joined, size = run
    return f"{model}-{'joined' if joined else 'apart'}-{size}"


@pytest.fixture(scope="module")
def randoms(tmp_path_factory) -> dict[str, RandomModel]:
    return {
        name: RandomModel(
            tmp_path_factory.mktemp(name), seed=i, n_head=4, n_layer=2, ffn_hidden_size=96, vocab_size=VOCAB,
            **sizes,
        )
        for i, (name, sizes) in enumerate(MODELS.items())
    }  # fmt: skip


@pytest.fixture(scope="module")
def batches() -> list[list[list[int]]]:
    """Unequal prompts in one batch, a single token among them; a single row; more rows."""
    return [prompts(0, VOCAB, 7, 1, 18), prompts(1, VOCAB, 21), prompts(2, VOCAB, 3, 5, 2, 4)]


def case_of(random: RandomModel, model: str, joined: bool, batches) -> dict:
    """What infer_process builds; the pool has exactly the blocks that the largest batch fills."""
    sizes = random.sizes
    config = {
        "hidden_size": sizes["hidden_size"], "num_layers": 2, "num_heads": 4,
        "n_kv_heads": sizes.get("num_key_value_heads"), "intermediate_size": sizes["ffn_hidden_size"],
        "vocab_size": VOCAB, "rms_norm_eps": sizes["layer_norm_epsilon"],
        "tie_word_embeddings": sizes["tie_word_embeddings"], "qkv_concat": joined, "use_past": True,
        "compute_dtype": "float32", "param_init_type": "float32", "seq_length": SEQ_LENGTH, "block_size": 4,
        "num_blocks": 13,
    }  # fmt: skip
    if "num_experts" in sizes:
        config["moe_config"] = {
            "expert_num": sizes["num_experts"], "num_experts_chosen": sizes["num_experts_per_tok"],
            "routing_policy": "TopkRouterV2",
        }  # fmt: skip
    return {
        "name": f"{model}-{joined}", "weights": model, "folder": str(random.hf), "config": config,
        "batches": batches, "new_tokens": NEW_TOKENS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def expected(randoms, batches) -> dict[str, list]:
    """The oracle's greedy tokens of every row alone, and the logits of its full forward at every step."""
    found = {}
    for name, random in randoms.items():
        found[name] = []
        for rows in batches:
            answers, logits = [], []
            for row in rows:
                tokens = list(row)
                for _ in range(NEW_TOKENS):
                    with torch.no_grad():
                        last = random.oracle(torch.tensor([tokens])).logits[0, -1].numpy()
                    logits.append(last)
                    tokens.append(int(last.argmax()))
                answers.append(tokens)
            found[name].append((answers, np.reshape(logits, (len(rows), NEW_TOKENS, VOCAB)).swapaxes(0, 1)))
    return found


@pytest.fixture(scope="module")
def found(randoms, batches, tmp_path_factory):
    """A function of runs and a number of processes: what each finds in the runs that are so shared."""
    results = {}

    def of(runs: list, size: int) -> list[dict]:
        key = size, runs is SLOW_RUNS
        if key not in results:
            cases = [
                case_of(randoms[model], model, joined, batches) for model, joined, n in runs if n == size
            ]
            weights = {name: dict(random.tensors()) for name, random in randoms.items()}
            results[key] = start(cases, weights, size) if size > 1 else [answers(cases, weights, 1, 0)]
        return results[key]

    def start(cases: list, weights: dict, size: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"processes{size}")
        for name in {case["weights"] for case in cases}:
            np.savez(folder / f"{name}.npz", **weights[name])
        (folder / "cases.json").write_text(json.dumps(cases))
        run_processes(folder, size, "infer_process.py")
        return [dict(np.load(folder / f"rank_{rank}.npz")) for rank in range(size)]

    return of


def run_processes(folder: Path, size: int, script: str) -> None:
    """Run a script of this folder in ``size`` processes; its argument is ``folder``."""
    here = Path(__file__).resolve().parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        "msrun", f"--worker_num={size}", f"--local_worker_num={size}", f"--master_port={port}",
        f"--log_dir={folder}/logs", "--join=True", str(here / script), str(folder),
    ]  # fmt: skip
    path = os.pathsep.join([str(here.parents[1]), str(here.parent), os.environ.get("PYTHONPATH", "")])
    told = subprocess.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    logs = "".join(log.read_text(errors="replace")[-3000:] for log in (folder / "logs").glob("worker_*.log"))
    assert told.returncode == 0, logs


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_every_process_answers_as_the_oracle(run, found, expected, batches):
    check_run(run, found(RUNS, run[2]), expected, batches)


@pytest.mark.slow
@pytest.mark.parametrize("run", SLOW_RUNS, ids=run_id)
def test_every_process_of_more_answers_as_the_oracle(run, found, expected, batches):
    check_run(run, found(SLOW_RUNS, run[2]), expected, batches)


def check_run(run, processes: list[dict], expected, batches) -> None:
    model, joined, size = run
    assert len(processes) == size
    for of_rank in processes:
        for i, rows in enumerate(batches):
            tokens, logits = expected[model][i]
            name = f"{model}-{joined}/{i}"
            assert [of_rank[f"{name}/{j}"].tolist() for j in range(len(rows))] == tokens
            assert 0.7 < logits.std() < 1.4  # the tolerance is meant for logits of about this size
            np.testing.assert_allclose(of_rank[f"{name}/logits"], logits, rtol=0, atol=2e-5)
