"""Record what a checkout computes, and compare two records: a refactoring must show no difference.

    python benchmarks/same_behaviour.py record before.json [--checkout ../other]
    python benchmarks/same_behaviour.py compare before.json after.json

Recorded are SHA-256 sums, so that equal means equal in every bit: logits, loss and gradients of small random
models; the training data, the weights after 21 steps and their losses, both conversions and greedy answers of
the tiny models; the files of a MindIE folder that are not code; check and estimate of every shipped finetune
YAML, and the dry-run report of three scaled down. A record takes about ten minutes. The commands run in a
temporary folder, in the active environment, with the checkout's own code.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
STEPS = ("--runner_config.epochs", "3")  # 3 x 7 steps
MODELS = {
    "dense": {},
    "tied": {"tied": True},
    "packed": {"more": {"document_start_ids": [1, 6]}},
    "ntk": {"more": {"extend_method": "DYNAMIC_NTK", "max_position_embedding": 32}, "seq_length": 64},
    "moe": {"sizes": {"num_experts": 4, "num_experts_per_tok": 2}},
}
SCALED = {
    "telechat2-7b/finetune_telechat_7b.yaml": ["recompute_config.recompute=True"],
    "telechat2-115b/finetune_telechat_115b.yaml": [
        "model.model_config.num_layers=72",
        "model.model_config.offset=0",
        "recompute_config.select_comm_recompute=True",
        "parallel_config.data_parallel=1",
    ],
    "telechat2-39b-a12b/finetune_telechat_39b_a12b.yaml": ["recompute_config.recompute=True"],
}
NOT_COMPARED = frozenset(("config", "left_out", "notes", "assumptions", "seconds", "peak_bytes"))  # of a plan
SMALL = ["model.model_config.num_layers=4", "model.model_config.vocab_size=4096"]


def sha(data: bytes) -> str:
    """The SHA-256 sum of bytes."""
    return hashlib.sha256(data).hexdigest()


def models() -> dict[str, str]:
    """Sums of logits, loss and gradients; runs in a process of its own, in the checkout's tests folder."""
    import numpy as np
    from model_fixtures import RandomModel, int32, loss_and_gradients

    found = {}
    for name, how in MODELS.items():
        length = how.get("seq_length", 32)
        with tempfile.TemporaryDirectory() as folder:
            random = RandomModel(
                Path(folder), seed=7, tied=how.get("tied", False), hidden_size=64, n_head=4, n_layer=2,
                num_key_value_heads=2, ffn_hidden_size=96, vocab_size=128, **how.get("sizes", {}),
            )  # fmt: skip
            model = random.build(seq_length=length, **how.get("more", {}))
            ids = np.random.default_rng(1).integers(0, 128, (2, length + 1))
            found[f"{name} logits"] = sha(model(int32(ids), int32(ids))[0].asnumpy().tobytes())
            loss, gradients = loss_and_gradients(model)(ids, ids)
            found[f"{name} loss"] = sha(loss.tobytes())
            for parameter, gradient in sorted(gradients.items()):
                found[f"{name} gradient {parameter}"] = sha(gradient.tobytes())
    return found


def without(value: object, keys: frozenset[str]) -> object:
    """A JSON value without the members of these names, at any depth."""
    if isinstance(value, dict):
        return {key: without(inner, keys) for key, inner in value.items() if key not in keys}
    return [without(inner, keys) for inner in value] if isinstance(value, list) else value


def sums_of(folder: Path, *patterns: str) -> dict[str, str]:
    """The sum of each file below a folder that one of the patterns matches; the path of the folder's parent
    does not count."""
    files = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    place = str(folder.parent).encode()
    return {str(path.relative_to(folder)): sha(path.read_bytes().replace(place, b"")) for path in files}


def records_of(path: Path) -> str:
    """The sum of the rows of a MindRecord, whatever lies around them in the file."""
    from mindspore.mindrecord import FileReader

    digest = hashlib.sha256()
    for row in FileReader(str(path)).get_next():
        for name in sorted(row):
            digest.update(row[name].tobytes())
    return digest.hexdigest()


class Recorder:
    """Commands of a checkout, run in a folder of their own."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.folder, self.found = checkout, folder, {}

    def run(self, script: str, *words: object) -> str:
        """What a command prints; an error ends the record."""
        done = subprocess.run(
            [sys.executable, self.checkout / script, *map(str, words)],
            cwd=self.folder, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "0"},
        )  # fmt: skip
        if done.returncode:
            raise ValueError(f"{script} {' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def note(self, part: str, values: dict[str, str]) -> None:
        """Keep sums under a heading."""
        print(f"{part}: {len(values)} values", flush=True)
        self.found |= {f"{part}: {name}": value for name, value in values.items()}

    def models(self) -> None:
        """Logits, loss and gradients."""
        path = os.pathsep.join([str(self.checkout / "tests"), str(self.checkout), str(HERE / "benchmarks")])
        code = "import json, same_behaviour; print('\\nSUMS' + json.dumps(same_behaviour.models()))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        if done.returncode:
            raise ValueError(f"the random models failed:\n{done.stderr}")
        self.note("models", json.loads(done.stdout.rpartition("SUMS")[2]))

    def tiny(self, kind: str) -> None:
        """Training, conversion and answers of a tiny model."""
        telechat, work = "research/telechat2", self.folder / kind
        self.run(
            "run_mindformer.py", "--config", f"{telechat}/telechat2-tiny/finetune_telechat_{kind}.yaml",
            "--train_dataset", "data/dataset.mindrecord", "--output_dir", work / "train", *STEPS,
        )  # fmt: skip
        lines = [json.loads(line) for line in (work / "train/metrics.jsonl").read_text("utf-8").splitlines()]
        self.note(f"{kind} losses", {f"step {line['step']}": str(line["loss"]) for line in lines})
        self.run(f"{telechat}/convert_reversed.py", "--mindspore_path", work / "train/checkpoint",
                 "--torch_path", work / "torch")  # fmt: skip
        self.run(f"{telechat}/convert_weight.py", "--torch_path", work / "torch",
                 "--mindspore_path", work / "mindspore")  # fmt: skip
        self.note(f"{kind} weights", sums_of(work, "torch/*.safetensors", "mindspore/*.safetensors"))
        ask = ["--yaml_file", f"predict_telechat_{kind}.yaml", "--vocab_file_path", "vocab/tokenizer.model"]
        said = self.run(
            f"{telechat}/run_telechat_predict.py", *ask, "--checkpoint_path", work / "mindspore",
            "--max_new_tokens", "12", "生抽与老抽的区别？", "hello",
        )  # fmt: skip
        answers = re.sub(r"\[\d+ tokens.*?\]", "", said.replace(str(self.folder), ""))  # without seconds
        self.note(f"{kind} answers", {"text": sha(answers.encode())})

    def mindie(self) -> None:
        """The folder for MindIE, without its code."""
        self.run(
            "research/telechat2/build_mindie_folder.py", "--yaml_file", "predict_telechat_tiny.yaml",
            "--vocab_file_path", "vocab/tokenizer.model", "--checkpoint_path", "tiny/mindspore",
            "--output_path", "mindie",
        )  # fmt: skip
        self.note("mindie", sums_of(self.folder / "mindie", "*.json", "*.yaml", "*.safetensors", "*.model"))

    def plans(self) -> None:
        """Check and estimate of every shipped finetune YAML; dry runs of three."""
        telechat = self.checkout / "research/telechat2"
        for yaml in sorted(telechat.glob("telechat2-*/finetune*.yaml")):
            if yaml.parent.name in ("telechat2-base", "telechat2-tiny"):
                continue
            name = str(yaml.relative_to(telechat))
            for more in ([], ["--estimate"]):
                self.plan(" ".join([name, *more]), yaml, *more)
        for name, changes in SCALED.items():
            more = ["--set", *SMALL, *changes, "--dry_run", "--rank", "0"]
            self.plan(f"{name} --dry_run", telechat / name, *more)

    def plan(self, name: str, *words: object) -> None:
        """The numbers of a report of telechat_plan.py, without prose, paths, and what compiling took."""
        file = self.folder / "plan.json"
        file.unlink(missing_ok=True)
        self.run("research/telechat2/telechat_plan.py", "--config", *words, "--json", file)
        numbers = without(json.loads(file.read_text("utf-8")), NOT_COMPARED)
        self.note("plan", {name: sha(json.dumps(numbers, sort_keys=True).encode())})


def record(checkout: Path, parts: list[str]) -> dict[str, str]:
    """All sums of a checkout."""
    with tempfile.TemporaryDirectory(prefix="same_behaviour_") as folder:
        recorder = Recorder(checkout.resolve(), Path(folder))
        dialogues = checkout.resolve() / "examples/dialogues.jsonl"
        recorder.run("examples/train_tokenizer.py", "--input", dialogues, "--output_path", "vocab")
        recorder.run(
            "research/telechat2/telechat_preprocess.py", "--input_dataset_file", dialogues,
            "--vocab_file_path", "vocab/tokenizer.model", "--max_length", "512", "--output_path", "data/",
        )  # fmt: skip
        recorder.note("data", {"rows": records_of(Path(folder) / "data/dataset.mindrecord")})
        todo = {
            "models": recorder.models, "dense": lambda: recorder.tiny("tiny"), "mindie": recorder.mindie,
            "moe": lambda: recorder.tiny("tiny_moe"), "plans": recorder.plans,
        }  # fmt: skip
        for part in parts or todo:
            todo[part]()
        return recorder.found


def compare(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The names whose values differ, or that one record lacks."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def main() -> None:
    """Record, or compare."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write a record to a new file")
    recording.add_argument("file", type=Path)
    recording.add_argument("--checkout", type=Path, default=HERE, help="by default this one")
    recording.add_argument("--parts", nargs="*", default=[], help="models dense mindie moe plans; all")
    comparing = commands.add_parser("compare", help="print what differs; exit status 1 if anything does")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        found = record(arguments.checkout, arguments.parts)
        arguments.file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return
    before, after = (json.loads(path.read_text("utf-8")) for path in (arguments.before, arguments.after))
    different = compare(before, after)
    print("\n".join([*different, f"{len(before)} values, {len(different)} differ"]))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
