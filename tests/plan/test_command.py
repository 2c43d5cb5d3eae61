"""telechat_plan.py's estimate, search and picture, as a user asks for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.plan.command import plan

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


@pytest.mark.parametrize("argument", ["picture", "json_file"])
def test_a_result_goes_into_a_folder_that_is_there(tmp_path, argument):
    with refused(tmp_path / "none"):
        plan("finetune_telechat_7b", {}, **{argument: tmp_path / "none" / "plan.png"})


def test_a_picture_is_a_png():
    with refused("--plot", "plan.svg", "plan.png"):
        plan("finetune_telechat_7b", {}, picture=Path("plan.svg"))


def test_a_slip_of_the_finger_in_the_micro_batches_does_not_hang():
    with refused("micro_batch_num is 1,000,000,000"):
        plan("finetune_telechat_115b", {"parallel_config.micro_batch_num": 10**9}, estimated=True)


def test_a_search_for_other_npus_than_the_configs_lists_plans_and_one_without_result_fails(tmp_path):
    found = plan("finetune_telechat_7b", {}, device_num=16, search_gb=58)
    assert "the first: --set" in found and "plans:" in found
    with refused("8 NPUs", "GB"):
        plan("finetune_telechat_115b", {}, device_num=8, search_gb=60, json_file=tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text())["search"]["plans"] == []
    done = run(tmp_path, "--search", "1GB")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "devices  " in done.stdout


def test_an_estimate_is_compared_with_max_device_memory():
    """70.65 GB were needed by the plan of 512 NPUs on 64, whose limit is 54.5 GB."""
    changes = {"parallel_config.data_parallel": 1}
    report = plan("finetune_telechat_115b", changes, estimated=True)
    assert "DOES NOT FIT  70.65 GB" in report and "54.5 GB" in report
    fits = plan("finetune_telechat_115b", changes | {"context.max_device_memory": "71GB"}, estimated=True)
    assert "fits          70.65 GB" in fits
    # all 30 layers of 7B are recomputed already
    full = plan("finetune_telechat_7b", {"context.max_device_memory": "32GB"}, estimated=True)
    assert "DOES NOT FIT" in full and "--search 32" in full and "recompute_config.recompute)" not in full
    alone = plan("finetune_telechat_7b", {"use_parallel": False}, estimated=True)
    assert "DOES NOT FIT" in alone and "--search" not in alone and "several NPUs" in alone
    with refused("max_device_memory", "'54'", "58GB"):
        plan("finetune_telechat_115b", changes | {"context.max_device_memory": "54"}, estimated=True)


def test_a_prediction_is_planned_with_its_weights_and_cache():
    """7,617,351,680 parameters of two bytes; keys and values of 30 layers of 4096, two bytes, 8192 tokens."""
    report = plan("predict_telechat_7b", {}, estimated=True)
    assert "15.23 GB of weights and 4.03 GB of cache" in report and "devices       1 " in report
    shared = plan("predict_telechat_7b_parallel", {}, device_num=4, estimated=True)
    assert "devices       4 " in shared and "1.01 GB of cache" in shared
    with refused("predict_telechat_7b", "--search", "--dry_run", "--estimate"):
        plan("predict_telechat_7b", {}, search_gb=58, dry=True)
    with refused("model_parallel is 8", "4 processes"):
        plan("predict_telechat_115b_parallel", {}, device_num=4)


def test_a_config_for_cpus_is_planned_and_its_estimate_says_what_to_set():
    assert "devices       1 = processes" in plan("finetune_telechat_tiny", {})
    with refused("device_target", "CPU", "context.device_target=Ascend"):
        plan("finetune_telechat_tiny", {}, estimated=True)
    changes = {"context.device_target": "Ascend", "model.model_config.compute_dtype": "bfloat16"}
    assert "tokens/s/NPU predicted" in plan("finetune_telechat_tiny", changes, estimated=True)
    assert "devices       1 " in plan("predict_telechat_tiny", {}, estimated=True)
