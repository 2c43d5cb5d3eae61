"""Experts shared by four processes, gradients included, give what a loop in torch gives."""

import json
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_moe import capacity, kept_assignments
from test_moe_region import LAYOUTS, cut
from torch_experts import to_torch, weighted_experts

from research.telechat2.parallel.experts import ExpertPlan

RANKS, EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 4, 8, 3, 6, 4, 32
CASES = [  # matrix, layout, capacity_factor, rule
    ((1, 2, 2), "experts", 0.7, "k-major"),
    ((2, 1, 2), "experts", 3.0, "token-major"),
    ((1, 2, 2), "widths", 0.7, "token-major"),
    ((2, 1, 2), "widths", 0.7, "k-major"),
    ((1, 2, 2), "widths-of-the-same-tokens", 0.7, "k-major"),
    ((1, 1, 4), "widths-of-the-same-tokens", 3.0, "k-major"),
    ((1, 2, 2), "experts", 0.0, "k-major"),
    ((2, 2, 1), "experts", 0.0, "k-major"),
]
NAMES = [f"{layout}-{'x'.join(map(str, matrix))}-{factor}-{rule}" for matrix, layout, factor, rule in CASES]


def plans(case) -> list[ExpertPlan]:
    matrix, layout, *_ = case
    return [ExpertPlan(*matrix, *LAYOUTS[layout], rank) for rank in range(RANKS)]


def layouts(plan: ExpertPlan) -> list:
    """Of x, the router, w1, w3, w2 and the biases; of the gradients of y and shares."""
    rows, columns = plan.weight_layouts()
    tokens, everywhere = plan.layout(plan.token_axes, "None"), plan.layout("None", "None")
    shares = plan.layout(plan.token_axes, "None", "None")
    return [tokens, everywhere, rows, rows, columns, plan.layout(*["None"] * 4), tokens, shares]


def whole_arrays(case) -> list[np.ndarray]:
    """What ``layouts`` cuts."""
    rng = np.random.default_rng(CASES.index(case))
    parts = plans(case)[0].token_parts
    shapes = [
        (TOKENS, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN),
        (EXPERTS, HIDDEN, WIDTH), (1, EXPERTS, 1, HIDDEN), (TOKENS, HIDDEN), (parts, 3, EXPERTS),
    ]  # fmt: skip
    return [
        (rng.standard_normal(shape) * (0.5 if i else 1)).astype(np.float32) for i, shape in enumerate(shapes)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each process found in all cases."""
    folder = tmp_path_factory.mktemp("processes")
    arrays, cases = {}, []
    for name, case in zip(NAMES, CASES, strict=True):
        whole = whole_arrays(case)
        for plan in plans(case):
            # Where processes have the same tokens, each brings its part of the gradient, as on the cluster.
            copies = RANKS // plan.token_parts
            for i, (array, layout) in enumerate(zip(whole, layouts(plan), strict=True)):
                local = cut(array, layout, plan.rank) / (copies if i > 5 else 1)
                arrays[f"{name}/{plan.rank}/{i}"] = np.ascontiguousarray(local, np.float32)
        matrix, layout, factor, rule = case
        cases.append(
            {
                "name": name, "plan": [*matrix, *LAYOUTS[layout]], "factor": factor, "rule": rule,
                "num_experts": EXPERTS, "top_k": TOP_K,
            }
        )  # fmt: skip
    np.savez(folder / "request.npz", **arrays)
    (folder / "cases.json").write_text(json.dumps(cases))
    here = Path(__file__).resolve().parents[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        "msrun", f"--worker_num={RANKS}", f"--local_worker_num={RANKS}", f"--master_port={port}",
        f"--log_dir={folder}/logs", "--join=True", str(here / "region_process.py"), str(folder),
    ]  # fmt: skip
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    told = subprocess.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    logs = "".join(log.read_text(errors="replace")[-3000:] for log in (folder / "logs").glob("worker_*.log"))
    assert told.returncode == 0, logs
    return [dict(np.load(folder / f"rank_{rank}.npz")) for rank in range(RANKS)]


def loop(case) -> tuple[list, list]:
    """y and shares, and the gradients of the first six arrays, in float64."""
    _, _, factor, rule = case
    *operands, dy, dshares = map(to_torch, whole_arrays(case))
    x, router, *weights = operands
    parts = plans(case)[0].token_parts
    answers, shares = [], []
    for own in x.chunk(parts):
        probabilities = (own @ router.T).softmax(-1)
        experts = torch.argsort(probabilities, -1, descending=True)[:, :TOP_K]
        picked = torch.gather(probabilities, 1, experts)
        limit = capacity(len(own), TOP_K, EXPERTS, factor) if factor else len(own)
        kept = kept_assignments(experts, EXPERTS, limit, rule)
        assert kept.all() == (factor != 0.7)
        gates = picked / (picked.sum(-1, keepdim=True) + 1e-9) * torch.tensor(kept)
        answers.append(weighted_experts(own, experts, gates, *weights))
        counts = [np.bincount(chosen, minlength=EXPERTS) for chosen in (experts.flatten(), experts[kept])]
        shares.append(
            torch.stack([probabilities.mean(0), *(torch.tensor(c) / experts.numel() for c in counts)])
        )
    y, shares = torch.cat(answers), torch.stack(shares)
    ((y * dy).sum() + (shares * dshares).sum()).backward()
    return [y.detach().numpy(), shares.detach().numpy()], [leaf.grad.numpy() for leaf in operands]


@pytest.mark.slow  # four processes, which compile each case
@pytest.mark.parametrize("name", NAMES)
def test_four_processes_are_one(found, name):
    case = CASES[NAMES.index(name)]
    outputs, gradients = loop(case)
    sums = [np.zeros(gradient.shape) for gradient in gradients]
    for plan in plans(case):
        local = [found[plan.rank][f"{name}/{i}"] for i in range(8)]
        *of_operands, tokens, shares = layouts(plan)
        for mine, whole, layout in zip(local[:2], outputs, (tokens, shares), strict=True):
            np.testing.assert_allclose(mine, cut(whole, layout, plan.rank), rtol=1e-5, atol=1e-6)
        for gradient, total, layout in zip(local[2:], sums, of_operands, strict=True):
            cut(total, layout, plan.rank)[...] += gradient  # a view
    for total, gradient in zip(sums, gradients, strict=True):
        assert np.linalg.norm(total - gradient) <= 2e-6 * np.linalg.norm(gradient)
