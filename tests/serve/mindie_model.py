"""The small models of the folders under test: their YAMLs, and a process that drives folders like MindIE."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
SELF_TEST = CHECKOUT / "research" / "telechat2" / "serve" / "mindie" / "self_test.py"
PROCESS = Path(__file__).with_name("mindie_process.py")
SIZES = {
    "hidden_size": 64, "n_layer": 2, "n_head": 4, "num_key_value_heads": 2, "ffn_hidden_size": 96,
    "vocab_size": 600,
}  # fmt: skip
EXPERTS = {"expert_num": 4, "num_experts_chosen": 2}
QUESTIONS = ["生抽与老抽的区别？", "x", "What is the weather in Beijing today?", "你好"]
NEW_TOKENS = 12


def write_yaml(path: Path, model_config: dict | None = None, **sections) -> Path:
    """A predict YAML of SIZES over the shipped base, on a CPU."""
    sizes = {
        "seq_length": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2,
        "intermediate_size": 96, "vocab_size": 600, "num_blocks": 64, "compute_dtype": "float32",
        "param_init_type": "float32", "res_dtype": "float32", "max_decode_length": 256,
    }  # fmt: skip
    content = {
        "base_config": str(CHECKOUT / "research" / "telechat2" / "telechat2-base" / "predict.yaml"),
        "model": {"model_config": sizes | (model_config or {})},
        "context": {"device_target": "CPU", "jit_config": {"jit_level": "O0"}},
    }
    path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
    return path


def assert_likeliest(random, told: dict) -> None:
    """What a folder's model answered to MindIE, and by its own ``generate``, the oracle finds likeliest too.

    One forward over each prompt and answer: each token must be the likeliest after those before it.
    """
    import torch

    assert told["answers"] == told["generated"]
    for prompt, answer in zip(told["prompts"], told["answers"], strict=True):
        assert len(answer) == NEW_TOKENS
        with torch.no_grad():
            logits = random.oracle(torch.tensor([prompt + answer])).logits[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


def drive(elsewhere: Path, folders: list[Path], broken: list[Path] = (), **variables: str) -> dict:
    """Ask the folders in one process that sees no checkout; what each said, and how the broken ones failed.

    The process runs in ``elsewhere``, and everything it writes stays there.
    """
    (said,) = drive_several(elsewhere, folders, broken, world_size=1, **variables)
    return said


def drive_several(elsewhere: Path, folders, broken=(), *, world_size: int, **variables: str) -> list[dict]:
    """The same by several processes, each with a part of the model; what each of them heard."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    jobs, processes = [], []
    for rank in range(world_size):
        jobs.append(elsewhere / f"job_{rank}.json")
        job = {"self_test": SELF_TEST, "folders": folders, "broken": broken, "questions": QUESTIONS}
        job |= {"new_tokens": NEW_TOKENS, "rank": rank if world_size > 1 else None, "world_size": world_size}
        jobs[-1].write_text(json.dumps(job, default=str))
        with open(elsewhere / f"log_{rank}", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", PROCESS, jobs[-1]],
                    cwd=elsewhere,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )  # fmt: skip
            )
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(elsewhere / f"log_{rank}").read_text(errors="replace") for rank in range(world_size)]
    assert codes == [0] * world_size, "\n".join(log[-4000:] for log in logs)
    return [json.loads(job.with_suffix(".said.json").read_text(encoding="utf-8")) for job in jobs]
