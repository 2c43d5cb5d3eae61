"""No environment, another MindFormers, a wrong version: one sentence from every command, before imports."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.common import environment

CHECKOUT = Path(__file__).resolve().parents[2]
TELECHAT = CHECKOUT / "research" / "telechat2"
COMMANDS = sorted(
    path
    for path in (CHECKOUT / "run_mindformer.py", *TELECHAT.glob("*.py"), *TELECHAT.glob("infer/*.py"))
    if "sys.path[0] = " in path.read_text(encoding="utf-8")
) + sorted((CHECKOUT / "examples").glob("*.py"))


def run(command: Path, *flags: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    words = [sys.executable, *flags, str(command), "--help"]
    return subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)


def one_error(told: subprocess.CompletedProcess) -> str:
    assert told.returncode == 1 and told.stdout == "", told.stdout
    (line,) = told.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_every_command_says_what_to_activate(command, tmp_path):
    """``-S`` leaves the installed packages out, as a Python without the environment does."""
    if command.name == "get_config.py":
        pytest.skip("copied into folders without the plugin; says that itself")
    said = one_error(run(command, "-S", cwd=tmp_path))
    assert "safetensors" in said and ("mindformers" in said) == (command.name not in environment.WITHOUT)
    assert re.search(r"activate the environment .*(\.venv/bin/activate|pip install -e)", said)


def package(folder: Path, name: str, version: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f'__version__ = "{version}"\nraise SystemExit("imported")\n')
    return folder


@pytest.mark.parametrize("name", ["mindformers", "mindspore"])
def test_another_package_on_the_path_is_named(tmp_path, name):
    other = package(tmp_path / "my 模型", name, "1.5.0")
    command = CHECKOUT / "run_mindformer.py"
    said = one_error(run(command, cwd=tmp_path, PYTHONPATH=str(other)))
    assert str(other / name) in said and "1.5.0" in said and "unset PYTHONPATH" in said
    allowed = run(command, cwd=tmp_path, PYTHONPATH=str(other), TELECHAT_ANY_VERSION="1")
    assert allowed.returncode == 0 and f"note: {name} is 1.5.0" in allowed.stderr
    converting = run(TELECHAT / "convert_weight.py", cwd=tmp_path, PYTHONPATH=str(other))
    assert (converting.returncode, converting.stderr) == (0, "")


def test_a_checkout_of_the_tested_version_is_used_and_named(tmp_path):
    other = package(tmp_path, "mindformers", environment.VERSIONS["mindformers"])
    told = run(CHECKOUT / "run_mindformer.py", cwd=tmp_path, PYTHONPATH=str(other))
    assert told.returncode == 0 and f"note: mindformers is taken from {other / 'mindformers'}" in told.stderr


def test_the_research_package_of_mindformers_is_named(tmp_path):
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "__init__.py").touch()
    for command in (CHECKOUT / "run_mindformer.py", TELECHAT / "convert_weight.py"):
        said = one_error(run(command, cwd=tmp_path, PYTHONPATH=str(tmp_path)))
        assert f"`research` of {tmp_path}" in said and str(CHECKOUT) in said


def test_folders_of_that_name_are_no_package(tmp_path):
    """A clone called mindformers in the working directory, or on the path."""
    (tmp_path / "mindformers" / "mindformers").mkdir(parents=True)
    for variables in ({}, {"PYTHONPATH": str(tmp_path)}):
        told = run(CHECKOUT / "run_mindformer.py", cwd=tmp_path, **variables)
        assert (told.returncode, told.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "version", "too_old"),
    [
        ("mindspore", "2.4.10", True),
        ("mindformers", "1.3.2", True),
        ("mindspore", "2.10.0", False),  # 2.10.0 with 2.1.0 was seen to run
        ("mindformers", "2.1.0", False),
        ("mindspore", "2.9.0rc1", False),
        ("mindformers", "dev", False),
    ],
)
def test_versions(monkeypatch, name, version, too_old):
    monkeypatch.delenv(environment.ANY_VERSION, raising=False)
    folder = environment._found(name)
    found = SimpleDistribution(version, folder)
    monkeypatch.setattr("importlib.metadata.distribution", lambda asked: found)
    if too_old:
        with refused(f"{name} is {version}", environment.VERSIONS[name], kind=ValueError):
            environment._notes(name, folder)
        monkeypatch.setenv(environment.ANY_VERSION, "1")
    (note,) = environment._notes(name, folder)
    assert version in note and environment.VERSIONS[name] in note


class SimpleDistribution:
    """An installed package of some version, in its place."""

    def __init__(self, version: str, folder: Path):
        self.version, self.folder = version, folder

    def locate_file(self, name: str) -> Path:
        return self.folder


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 2))
    with refused("Python 3.9", "3.11", kind=ValueError):
        environment.check_environment("run_mindformer.py")


def test_the_versions_are_those_of_pyproject():
    pinned = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, version in environment.VERSIONS.items():
        assert f"{name}=={version}" in pinned
    names = {requirement.split("==")[0] for requirement in pinned}
    assert set(environment.PACKAGES.values()) <= names


def test_a_worker_tells_its_launcher(tmp_path):
    variables = {"TELECHAT_ERRORS": str(tmp_path), "MS_ROLE": "MS_WORKER", "RANK_ID": "3"}
    told = run(CHECKOUT / "run_mindformer.py", "-S", cwd=tmp_path, **variables)
    assert (told.returncode, told.stderr) == (1, "")
    assert (tmp_path / "rank_3").read_text().startswith("error: ")


def test_a_package_that_an_option_needs_is_named(tmp_path):
    """Here: the plan is printed without MindSpore, its dry run is not possible."""
    code = (
        "import sys; sys.modules['mindspore'] = None\n"
        "from research.telechat2.common.cli import run\n"
        "def main():\n    import mindspore.nn\n"
        "run(main)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert "mindspore: not installed" in one_error(told)
    assert shutil.which("python")


def test_ctrl_c_in_the_imports_ends_without_a_traceback():
    """A command has its own handlers later, when its modules are imported."""
    check = f"import runpy; runpy.run_path({environment.__file__!r})['main']('convert_weight.py')"
    code = f"{check}; import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stdout, told.stderr) == (130, "", "interrupted\n")
