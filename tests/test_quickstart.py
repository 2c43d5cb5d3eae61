"""The quickstart's own refusals; that it works is tested with the README's commands."""

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


def test_help_says_what_is_expected(tmp_path):
    told = quickstart(tmp_path, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("usage: bash scripts/quickstart.sh [--moe] [FOLDER]\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mo"], "unknown option --mo; expected --moe, or --help."),
        (["a", "--dense"], "unknown option --dense; "),
        (["a", "--moe", "b"], "two folders are named, a and b; expected one."),
    ],
)
def test_mistyped_arguments_start_nothing(tmp_path, words, said):
    told = quickstart(tmp_path, *words)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith(f"error: {said}")
    assert not any(tmp_path.iterdir())
