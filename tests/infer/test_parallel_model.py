"""Processes that share a model answer as the oracle does: dense and MoE, rows joined or not."""

import json
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from infer_process import answer, build
from model_fixtures import RandomModel, prompts

SEQ_LENGTH, VOCAB, NEW_TOKENS = 48, 256, 8
MODELS = {  # kv heads (of 4), and what else config.json says
    "mha": {"hidden_size": 64},
    "gqa": {"hidden_size": 128, "num_key_value_heads": 2},
    "moe": {"hidden_size": 64, "num_key_value_heads": 4, "num_experts": 5, "num_experts_per_tok": 2},
    "tied": {"hidden_size": 64, "num_key_value_heads": 4, "tied": True},
}
CASES = [  # model, qkv_concat, numbers of processes
    ("mha", False, (1, 2, 4)),
    ("mha", True, (1, 2, 4)),
    ("gqa", False, (2,)),
    ("gqa", True, (1, 2)),
    ("moe", False, (1, 2, 4)),
    ("moe", True, (2,)),
    ("tied", False, (2,)),
]
RUNS = [(model, joined, size) for model, joined, sizes in CASES for size in sizes]


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
        "name": f"{model}-{joined}", "weights": model, "config": config, "batches": batches,
        "new_tokens": NEW_TOKENS,
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


def alone(randoms, batches) -> dict:
    """What one process finds."""
    found = {}
    for model, joined, size in RUNS:
        if size == 1:
            case = case_of(randoms[model], model, joined, batches)
            cell = build(case, dict(randoms[model].tensors()), 1, 0)
            for i, rows in enumerate(batches):
                tokens, logits = answer(cell, rows, NEW_TOKENS)
                found[f"{case['name']}/{i}/logits"] = logits
                found |= {f"{case['name']}/{i}/{j}": row for j, row in enumerate(tokens)}
    return found


@pytest.fixture(scope="module")
def found(randoms, batches, tmp_path_factory):
    """A function of a number of processes: what each of them finds in its cases; started once."""
    results = {}

    def of(size: int) -> list[dict]:
        if size not in results:
            results[size] = [alone(randoms, batches)] if size == 1 else start(size)
        return results[size]

    def start(size: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"processes{size}")
        for name, random in randoms.items():
            np.savez(folder / f"{name}.npz", **dict(random.tensors()))
        cases = [case_of(randoms[model], model, joined, batches) for model, joined, n in RUNS if n == size]
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
    model, joined, size = run
    for rank, of_rank in enumerate(found(size)):
        for i, rows in enumerate(batches):
            answers, logits = expected[model][i]
            name = f"{model}-{joined}/{i}"
            assert [of_rank[f"{name}/{j}"].tolist() for j in range(len(rows))] == answers, rank
            assert 0.7 < logits.std() < 1.4  # the tolerance is meant for logits of about this size
            np.testing.assert_allclose(of_rank[f"{name}/logits"], logits, rtol=0, atol=2e-5)
