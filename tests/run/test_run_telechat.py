"""run_telechat.py: training by the high-level command."""

import json
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
TELECHAT = CHECKOUT / "research" / "telechat2"


def test_it_trains_what_a_users_own_yaml_says(small_vocab, tmp_path):
    line = json.dumps({"input": "<_user>你好", "output": "好"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(line, encoding="utf-8")
    # a user's YAML that stands on the shipped one, and names the model as older YAMLs do
    (tmp_path / "own.yaml").write_text(
        f"base_config: {TELECHAT}/telechat2-tiny/finetune_telechat_tiny.yaml\n"
        "runner_config: {epochs: 2, batch_size: 1}\n"
        "model:\n"
        "  model_config: {seq_length: 32, num_layers: 1, auto_register: telechat_config.TelechatConfig}\n"
        "  arch: {auto_register: telechat.TelechatForCausalLM}\n"
    )
    prepare = [sys.executable, str(TELECHAT / "telechat_preprocess.py"), "--input_dataset_file", "d.jsonl"]
    prepare += ["--vocab_file_path", str(small_vocab), "--max_length", "32", "--output_path", "data/"]
    subprocess.run(prepare, cwd=tmp_path, check=True)
    train = [sys.executable, str(TELECHAT / "run_telechat.py"), "--config", "own.yaml"]
    train += ["--train_dataset", "data/dataset.mindrecord", "--run_mode", "train", "--output_dir", "out"]
    result = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (tmp_path / "out" / "checkpoint" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert (tmp_path / "out" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "checkpoint" / "prompt_format.json").read_text()) == {
        "prompt_format": "plain"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "data", "out", "own.yaml"]
