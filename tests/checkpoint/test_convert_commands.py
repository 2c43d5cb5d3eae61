"""convert_weight.py and convert_reversed.py as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from oracle import stored_tensors, write_hf_folder
from refusal import refused

from research.telechat2.checkpoint.convert import convert_to_mindspore

CHECKOUT = Path(__file__).resolve().parents[2]


def command(name, *arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = CHECKOUT / "research" / "telechat2" / name
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_two_commands(tmp_path):
    """The README's commands, with paths relative to the current folder; errors are one sentence."""
    write_hf_folder(tmp_path / "hf", {}, seed=1, dtype="bfloat16", shards=2)
    (tmp_path / "hf" / "prompt_format.json").write_text(json.dumps({"prompt_format": "chat"}))
    there = command(
        "convert_weight.py", "--torch_path", "hf", "--mindspore_path", "out/telechat", cwd=tmp_path
    )
    assert there.returncode == 0, there.stderr
    parameters = 2 * (4 * 64**2 + 3 * 96 * 64 + 4 * 64) + 2 * 128 * 64 + 64
    wrote = f"wrote 23 tensors, {parameters:,} parameters, {2 * parameters:,} bytes, bfloat16"
    assert f"{wrote}, to out/telechat/model.safetensors\n" in there.stdout
    assert "prompt format recorded with the weights: chat" in there.stdout
    back = command(
        "convert_reversed.py", "--mindspore_path", "out/telechat", "--torch_path", "back", cwd=tmp_path
    )
    assert back.returncode == 0, back.stderr
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")

    again = command(
        "convert_weight.py", "--torch_path", "hf", "--mindspore_path", "out/telechat", cwd=tmp_path
    )
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr.startswith("error: out/telechat already holds model.safetensors")
    assert again.stderr.count("\n") == 1
    assert command("convert_weight.py", "--torch_path", "hf", cwd=tmp_path).returncode == 2


def test_frameworks_are_not_imported_for_safetensors():
    """No torch, no MindSpore: --help and errors come at once, and torch need not be installed."""
    check = "import sys, research.telechat2.checkpoint; print({'torch', 'mindspore'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_bin_without_torch_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "torch", None)
    with refused("pip install torch"):
        convert_to_mindspore(tmp_path, tmp_path / "out")
