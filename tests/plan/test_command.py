"""telechat_plan.py's estimate, search and picture, as a user asks for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parents[2] / "research/telechat2/telechat_plan.py"


def run(tmp_path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, COMMAND, "--config", "finetune_telechat_7b.yaml", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_the_estimate_the_best_plans_and_a_picture_in_one_call(tmp_path):
    done = run(tmp_path, "--estimate", "--search", "58", "--plot", "plan.png", "--json", "plan.json")
    assert done.returncode == 0, done.stderr
    assert "tokens/s/NPU predicted" in done.stdout and "plans:" in done.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report.keys() == {"config", "check", "estimate", "search"}
    # 7,617,351,680 parameters, each with two float32 moments, over eight ranks
    assert report["estimate"]["stages"][0]["memory"]["optimizer"] == pytest.approx(7.617e9 * 8 / 8, rel=0.01)


def test_a_picture_is_not_drawn_over_another(tmp_path):
    (tmp_path / "plan.png").write_text("mine")
    done = run(tmp_path, "--plot", "plan.png")
    assert done.returncode == 1 and "plan.png exists and is not overwritten" in done.stderr
    assert (tmp_path / "plan.png").read_text() == "mine"
