"""The quickstart's own refusals; that it works is tested with the README's commands."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


def quickstart(cwd: Path, *words: str) -> subprocess.CompletedProcess:
    command = ["bash", str(CHECKOUT / "scripts" / "quickstart.sh"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "default"), [([], "output/quickstart"), (["--moe"], "output/quickstart_moe")]
)
def test_a_folder_that_exists_is_not_written_into(tmp_path, words, default):
    (tmp_path / "mine").mkdir()
    told = quickstart(tmp_path, *words, "mine")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == f"error: mine exists already; name a folder that does not, or none for {default}.\n"
    assert not any((tmp_path / "mine").iterdir())


def stub(folder: Path, fail_in: str = "") -> dict[str, str]:
    """An environment whose ``python`` notes its words, and makes what the quickstart expects of it."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(
        "#!/bin/bash\n"
        'case "$*" in *sys.version_info*) exit 0 ;; "- "*) exit 0 ;; esac\n'  # Python 3.11, complete
        'printf "%s\\n" "$1" >>"$CALLS"\n'
        f'[[ -n "{fail_in}" && "$1" == *{fail_in} ]] && exit 130\n'
        "mkdir -p vocab data train && touch vocab/tokenizer.model\n"
    )
    python.chmod(0o755)
    return os.environ | {
        "VIRTUAL_ENV": str(folder),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
    }


def run_stub(work: Path, environment: dict) -> subprocess.CompletedProcess:
    command = ["bash", str(CHECKOUT / "scripts" / "quickstart.sh"), str(work)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_an_interrupted_quickstart_is_repeated(tmp_path):
    work = tmp_path / "my 模型 it's"
    cut = run_stub(work, stub(tmp_path / "first", fail_in="run_mindformer.py"))
    assert cut.returncode == 130 and (work / "train").is_dir()
    (work / "train" / "checkpoint").mkdir()
    (work / "notes.txt").write_text("mine")
    again = run_stub(work, stub(tmp_path / "second"))
    assert again.returncode == 0, again.stderr
    assert "left unfinished" in again.stdout and not (work / "train" / "checkpoint").exists()
    assert (work / "notes.txt").read_text() == "mine"
    calls = (tmp_path / "second" / "calls").read_text().splitlines()
    assert [Path(call).name for call in calls].count("run_mindformer.py") == 1
    finished = run_stub(work, stub(tmp_path / "third"))
    assert finished.returncode == 1 and "exists already" in finished.stderr


def test_a_quickstart_that_still_runs_is_left_alone(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / ".quickstart_unfinished").write_text(f"{os.getpid()}\n")
    told = run_stub(work, stub(tmp_path / "environment"))
    assert told.returncode == 1 and "exists already" in told.stderr


def test_the_printed_command_can_be_pasted(tmp_path):
    work = tmp_path / "my 模型 it's $HOME"
    told = run_stub(work, stub(tmp_path / "an environment"))
    assert told.returncode == 0, told.stderr
    words = shlex.split(told.stdout.rsplit("Go on with a conversation: ", 1)[1])
    assert words[0] == str(tmp_path / "an environment" / "bin" / "python")
    assert words[words.index("--vocab_file_path") + 1] == str(work / "vocab" / "tokenizer.model")
    assert "模型 it" in told.stdout.splitlines()[-1]  # not as \\346\\250\\241


def test_help_says_what_is_expected(tmp_path):
    told = quickstart(tmp_path, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("usage: bash scripts/quickstart.sh [--moe] [--yes] [FOLDER]\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mo"], "unknown option --mo; expected --moe, --yes, or --help."),
        (["a", "--dense"], "unknown option --dense; "),
        (["a", "--moe", "b"], "two folders are named, a and b; expected one."),
    ],
)
def test_mistyped_arguments_start_nothing(tmp_path, words, said):
    told = quickstart(tmp_path, *words)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith(f"error: {said}")
    assert not any(tmp_path.iterdir())
