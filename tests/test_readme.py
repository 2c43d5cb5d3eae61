"""The READMEs: both say the same, all they name exists, and every command does what the text promises."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest

from research.telechat2.config.yaml_files import resolve_config
from research.telechat2.run.arguments import LEGACY

CHECKOUT = Path(__file__).resolve().parents[1]
ENGLISH = (CHECKOUT / "README.md").read_text(encoding="utf-8")
CHINESE = (CHECKOUT / "README_CN.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BASH = [text for language, text in BLOCK.findall(ENGLISH) if language == "bash"]
COMMANDS = [shlex.split(line) for text in BASH for line in text.replace("\\\n", " ").splitlines()]


def prose(readme: str) -> str:
    return BLOCK.sub("", readme)


def inline_code(readme: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(readme))


def test_both_languages_have_the_same_commands_names_and_sections():
    # but for the language of the report page
    assert BLOCK.findall(ENGLISH) == BLOCK.findall(CHINESE.replace("--report zh\n", "--report\n")) != []
    assert set(inline_code(ENGLISH)) == set(inline_code(CHINESE))
    for pattern in (r"^#+ ", r"^\|"):  # headings, table rows
        found = [re.findall(pattern, prose(readme), re.MULTILINE) for readme in (ENGLISH, CHINESE)]
        assert found[0] == found[1]


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_links_lead_somewhere(readme):
    headings = re.findall(r"^#+ (.+)$", prose(readme), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        assert target[1:] in anchors if target.startswith("#") else (CHECKOUT / target).exists(), target


def test_files_that_the_text_names_exist():
    plugin = CHECKOUT / "research" / "telechat2"
    folders = (CHECKOUT, plugin, plugin / "serve" / "mindie")  # the last one's file goes into MindIE's folder
    named = [code for code in inline_code(ENGLISH) if re.fullmatch(r"[\w*./-]+(\.py|\.sh|\.toml|/)", code)]
    assert len(named) > 20
    for name in named:
        assert any(any(folder.glob(name.rstrip("/"))) for folder in folders), name


@cache
def known_flags(*command: str) -> frozenset[str]:
    """The options that ``--help`` of a program lists."""
    interpreter = "bash" if command[0].endswith(".sh") else sys.executable
    told = subprocess.run(
        [interpreter, str(CHECKOUT / command[0]), *command[1:], "--help"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    return frozenset(re.findall(r"--[a-z_]+", told.stdout))


def program(words: list[str]) -> tuple[str, ...]:
    """The file that a command runs, and its subcommand."""
    return tuple(words[1:3]) if words[2:3] == ["show"] else (words[1],)


def by_name(flag: str, known: frozenset[str]) -> bool:
    """Whether argparse takes ``flag``: itself, or as the beginning of one option only."""
    return flag in known or sum(option.startswith(flag) for option in known) == 1


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: Path(words[1]).name)
def test_commands_name_files_and_flags_that_exist(words):
    assert words[0] in ("bash", "python") and (CHECKOUT / words[1]).is_file()
    for before, word in zip(words, words[1:], strict=False):
        if word.startswith(("examples/", "research/", "benchmarks/", "scripts/", "./")) or word.endswith(
            ".yaml"
        ):
            assert (CHECKOUT / word).exists() or resolve_config(word, CHECKOUT), (before, word)
    for flag in (word for word in words if word.startswith("--")):
        overridden = "." in flag and words[1] == "run_mindformer.py"
        assert overridden or by_name(flag, known_flags(*program(words))), flag


def test_flags_of_tables_and_text_exist():
    table = re.findall(r"^\| `(--\w+)` \|", ENGLISH, re.MULTILINE)
    assert len(table) == 12 and set(table) <= known_flags("research/telechat2/telechat_preprocess.py")
    everywhere = frozenset().union(
        *(known_flags(*program(w)) for w in COMMANDS if w[0] == "python" or "quickstart" in w[1])
    )
    everywhere |= {flag for spellings, *_ in LEGACY for flag in spellings.split()}  # which no help lists
    mentioned = {flag for code in inline_code(ENGLISH) for flag in re.findall(r"--[a-z_]+(?![\w.])", code)}
    assert mentioned - everywhere == set()


# ---------------------------------------------------------------------- in a clean clone
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


class Clone:
    """A clean clone with an environment that counts as set up, so that nothing is installed."""

    def __init__(self, folder: Path):
        self.path = folder / "clone"
        git = subprocess.run(
            ["git", "clone", "-q", str(CHECKOUT), str(self.path)], capture_output=True, text=True
        )
        if git.returncode:
            pytest.skip(f"needs the checkout to be a git repository: {git.stderr.strip()}")
        active = folder / "environment"
        active.mkdir()
        files = (self.path / name for name in ("pyproject.toml", "constraints.txt"))
        pins = sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        (active / "telechat2_installed").write_text(f"{pins}  - {self.path}\n")
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CONDA_PREFIX")}
        self.environment |= {
            "VIRTUAL_ENV": str(active),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.peak = folder / "peak"

    def run(self, block: str) -> str:
        """Run a block as a user would; return what it wrote. It must succeed."""
        began = time.monotonic()
        told = subprocess.run(
            [sys.executable, "-c", MEASURED, str(self.peak), "bash", "-ec", block],
            cwd=self.path, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert told.returncode == 0, f"{block}\n{told.stdout[-5000:]}"
        seconds = time.monotonic() - began
        print(f"{seconds:.0f} s, peak {self.peak_bytes() / 1e9:.2f} GB: {block.splitlines()[0]}")
        return told.stdout

    def peak_bytes(self) -> int:
        """Largest resident memory of any one process of the last block."""
        return int(self.peak.read_text()) * 1024

    def top(self) -> set[str]:
        return {path.name for path in self.path.iterdir()} - {"__pycache__"}


def readme_answer() -> str:
    """What the examples teach as the answer to the README's question."""
    for line in (CHECKOUT / "examples" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line).get("messages", [])
        if [message["content"] for message in messages[:1]] == ["生抽与老抽的区别？"]:
            return messages[1]["content"]
    raise AssertionError("the examples do not hold the README's question")


def log_of(clone: Clone, output: str) -> str:
    """What MindFormers wrote of a run, of which the screen has the run's own lines."""
    return (clone.path / "output" / output / "log" / "run.log").read_text(encoding="utf-8")


STEP = re.compile(r"Epoch:\[\s*(\d+)/\s*\d+\], step:\[\s*(\d+)/\s*7\], loss:\[([\d.]+)/")


def check_quickstart(clone: Clone, said: str, folder: str = "quickstart") -> None:
    right = re.search(
        r"^(\d+) of 100 conversations end with the trained answer word for word", said, re.MULTILINE
    )
    assert right and int(right[1]) >= 95, said[-2000:]
    assert f"\n生抽与老抽的区别？\n{readme_answer()}\n" in said
    assert "installing" not in said
    assert clone.peak_bytes() < 6e9
    work = clone.path / "output" / folder
    assert (work / "train" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert any((work / "train" / "tensorboard").rglob("events.out.tfevents.*"))
    assert any((work / "train" / "checkpoint").glob("iteration_*"))


def check_quickstart_experts(clone: Clone, said: str) -> None:
    """What the README says of the log and of TensorBoard too."""
    check_quickstart(clone, said, "quickstart_moe")
    work = clone.path / "output" / "quickstart_moe"
    example = next(text for _, text in BLOCK.findall(ENGLISH) if "of a fair share" in text)
    form = re.sub(r"\d+", r"\\d+", re.escape(example.strip()))
    log = log_of(clone, "quickstart_moe/train")
    assert len(re.findall(form, log)) == len(re.findall(r"loss:\[", log))
    tags = events(work / "train" / "tensorboard")
    for tag in ("busiest", "idlest", "dropped"):
        assert {f"experts/{tag}/layer_0", f"experts/{tag}/layer_1"} <= tags


def events(folder: Path) -> set[str]:
    """The names of the scalars in a folder of TensorBoard's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = set()
    for file in folder.rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(file))
        accumulator.Reload()
        names |= set(accumulator.Tags()["scalars"])
    return names


def check_data(clone: Clone, said: str) -> None:
    assert "read 100 lines = 100 conversations written + 0 skipped" in said


def check_parts(clone: Clone, said: str) -> None:
    assert "read 100 lines = 100 conversations written + 0 skipped" in said and ", 3 files" in said
    names = {path.name for path in (clone.path / "output/parts").iterdir()}
    parts = {f"dataset-0000{n}.mindrecord{suffix}" for n in range(3) for suffix in ("", ".db", ".json")}
    assert names == parts | {"dataset.mindrecord.json", "dataset.mindrecord.html"}


def check_show(clone: Clone, said: str) -> None:
    assert "--- line 64:" in said and said.count("⟦") == said.count("⟧") >= 1


def check_weights(clone: Clone, said: str) -> None:
    """There and back again, from the same training: the bytes of the quickstart's own conversion."""
    output = clone.path / "output"
    files = [folder / "mindspore" / "model.safetensors" for folder in (output, output / "quickstart")]
    assert files[0].read_bytes() == files[1].read_bytes()


def check_finetune(clone: Clone, said: str) -> None:
    log = log_of(clone, "finetune")
    assert [(int(epoch), int(step)) for epoch, step, _ in STEP.findall(log)] == [
        (epoch, step) for epoch in (1, 2) for step in range(1, 8)
    ]
    assert "\nstep 14/14  loss " in said and "mindformers/" not in said
    assert float(STEP.search(log)[3]) < 0.1  # it starts from what the quickstart learned
    saved = sorted(path.name for path in (clone.path / "output/finetune/checkpoint").glob("iteration_*"))
    assert saved == ["iteration_00000007", "iteration_00000014"]


def check_resume(clone: Clone, said: str) -> None:
    log = log_of(clone, "finetune_on")
    assert [(int(epoch), int(step)) for epoch, step, _ in STEP.findall(log)] == [(3, s) for s in range(1, 8)]
    metrics = (clone.path / "output" / "finetune_on" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 22))


def check_eval(clone: Clone, said: str) -> None:
    loss = re.search(r"^evaluation: loss ([\d.]+) .*perplexity ([\d.]+)", said, re.MULTILINE)
    assert loss and 0 < float(loss[1]) < 0.1 and 1 < float(loss[2]) < 1.1, said[-2000:]


def check_predict(clone: Clone, said: str) -> None:
    assert f"\n生抽与老抽的区别？{readme_answer()}\n" in said


def check_ask(clone: Clone, said: str) -> None:
    assert f"生抽与老抽的区别？\n{readme_answer()}\n" in said


def check_two_processes(clone: Clone, said: str) -> None:
    saved = {path.parent.name for path in (clone.path / "output/two/checkpoint").rglob("*.safetensors")}
    assert saved == {"rank_0", "rank_1"}
    log = (clone.path / "output/msrun_log/worker_0.log").read_text(encoding="utf-8", errors="replace")
    # 14 records for two
    assert len(re.findall(r"loss:\[[\d.]+", log)) == 7


def check_relatives(clone: Clone, said: str) -> None:
    """transformers answers the README's question from the exported folder; the way back gives our weights."""
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer, LlamaForCausalLM

    output = clone.path / "output"
    tokenizer = AutoTokenizer.from_pretrained(output / "llama")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "生抽与老抽的区别？"}],
        add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(output / "llama", dtype=torch.float32).eval()
    answer = model.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == readme_answer()
    back, ours = (load_file(output / name / "model.safetensors") for name in ("from_llama", "mindspore"))
    assert back.keys() == ours.keys() and all((back[name] == ours[name]).all() for name in ours)


def check_plan(clone: Clone, said: str) -> None:
    plans = [line.split() for line in said.splitlines() if line.startswith("devices")]
    assert [plan[1] for plan in plans] == ["512", "512"]
    assert "data_parallel 64 x model_parallel 4 x pipeline_stage 2" in said


def check_mindie(clone: Clone, said: str) -> None:
    """What the folder's model says as MindIE asks it, and that the folder holds what the text lists."""
    folder = clone.path / "output" / "mindie" / "telechat2_tiny"
    answer = re.search(r"^self-test: .* it begins to answer: '(.*)'$", said, re.MULTILINE)
    assert answer and readme_answer().startswith(answer[1].rstrip("\ufffd"))
    assert (folder / "mindie.txt").read_text(encoding="utf-8") in said
    named = ("config.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
    assert all((folder / name).is_file() for name in named)
    assert len(list(folder.glob("*.yaml"))) == 1


def check_benchmark(clone: Clone, said: str) -> None:
    assert "step" in said and "decode" in said


CHECKS = [
    check_quickstart, None, check_data, check_parts, check_show, check_weights, check_ask,
    check_finetune, check_resume, check_eval, check_predict, check_ask, check_ask, check_quickstart_experts,
    check_relatives, check_plan, check_mindie, check_two_processes, check_benchmark,
]  # fmt: skip


def test_every_block_but_that_of_the_tests_has_a_check():
    unchecked = [block for block, check in zip(BASH, CHECKS, strict=True) if not check]
    assert unchecked == ["bash scripts/test.sh\n"]


@pytest.mark.slow  # trains the small model to the end: minutes
def test_every_command_does_what_the_readme_promises(tmp_path):
    """All blocks in their order, each on what those before it left, but for the tests themselves."""
    if not shutil.which("git"):
        pytest.skip("needs git, to make a clean clone")
    clone = Clone(tmp_path)
    before = clone.top()
    for block, check in zip(BASH, CHECKS, strict=True):
        if check:
            check(clone, clone.run(block))
    assert clone.top() - before == {"output"}
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=clone.path, capture_output=True, text=True)
    assert changed.stdout == ""
