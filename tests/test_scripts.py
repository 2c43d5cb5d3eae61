"""The shell scripts: the launcher's positional contract, and an environment that is set up once."""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
LAUNCHER = CHECKOUT / "scripts" / "msrun_launcher.sh"
SCRIPTS = [*sorted((CHECKOUT / "scripts").glob("*.sh")), CHECKOUT / ".ci" / "run"]


def executable(path: Path, text: str) -> None:
    path.write_text(textwrap.dedent(text))
    path.chmod(0o755)


@pytest.fixture
def fake_bin(tmp_path) -> Path:
    """A directory for programs that stand in for the real ones; ``msrun`` prints its words, one a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(
        folder / "msrun",
        '#!/bin/bash\nprintf "%s\\n" "$@" "PYTHONPATH=$PYTHONPATH"\nexit "${MSRUN_STATUS:-0}"\n',
    )
    return folder


def bash(*words, cwd: Path, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MF_LOG_SUFFIX")
    }
    environment |= variables
    if path:
        environment["PATH"] = f"{path}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed; the script was only parsed")
    found = subprocess.run([shellcheck, "-x", str(script)], capture_output=True, text=True, cwd=CHECKOUT)
    assert found.returncode == 0, found.stdout


def test_ci_runs_the_test_command_of_the_readme():
    lines = (CHECKOUT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["bash scripts/test.sh"]


@pytest.mark.parametrize("words", [["quickstart.sh", "--help"], ["msrun_launcher.sh", "echo a [b]", "1"]])
def test_scripts_work_when_sh_starts_them(words, tmp_path):
    """``sh`` is dash on Debian and Ubuntu, which knows neither pipefail nor arrays."""
    shell = shutil.which("dash") or pytest.skip("no dash")
    command = [shell, str(CHECKOUT / "scripts" / words[0]), *words[1:]]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith(("usage: bash scripts/quickstart.sh", "a [b]\n"))


COMMAND = "python x.py --a 1"
NINE = ["16", "8", "192.168.1.1", "8118", "1", "logs", "True", "300"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"worker_num": "8", "local_worker_num": "8", "join": "False", "log_dir": "output/msrun_log"}),
        (
            ["4"],
            {"worker_num": "4", "local_worker_num": "4", "master_addr": "127.0.0.1", "master_port": "8118"},
        ),
        (["2", "9000", "logs", "True", "60"], {"master_port": "9000", "log_dir": "logs", "join": "True"}),
        (NINE, {"worker_num": "16", "local_worker_num": "8", "master_addr": "192.168.1.1", "node_rank": "1"}),
        (NINE, {"cluster_time_out": "300", "tail_worker_log": "8", "bind_core": "False", "join": "True"}),
    ],
)
def test_positional_arguments_reach_msrun(fake_bin, tmp_path, words, expected):
    result = bash(LAUNCHER, COMMAND, *words, cwd=tmp_path, path=fake_bin)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    options = dict(line[2:].split("=", 1) for line in lines if line.startswith("--") and "=" in line)
    assert expected.items() <= options.items()
    assert lines[lines.index("python") :][:4] == COMMAND.split()
    assert f"PYTHONPATH={CHECKOUT}" in lines
    background = "follow them with: tail -f output/msrun_log/worker_0.log" in result.stdout
    assert background == (options["join"] == "False" and options["log_dir"] != "logs")


@pytest.mark.parametrize("count", [0, 3, 4, 5, 7, 8, 10])
def test_a_wrong_number_of_arguments_shows_the_usage(fake_bin, tmp_path, count):
    result = bash(LAUNCHER, *(["1"] * count), cwd=tmp_path, path=fake_bin)
    assert result.returncode == 2
    assert f"{count} arguments given, expected 1, 2, 6 or 9" in result.stderr and "usage:" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([COMMAND, "two"], "WORKERS must be a whole number, got 'two'"),
        ([COMMAND, "0"], "WORKERS must be at least 1"),
        ([COMMAND, "2", "8118", "logs", "yes", "60"], "JOIN must be True or False, got 'yes'"),
        (
            [COMMAND, "2", "4", "127.0.0.1", "8118", "0", "l", "True", "60"],
            "LOCAL_WORKERS must lie between 1",
        ),
        ([COMMAND, "10", "8", "127.0.0.1", "8118", "0", "l", "True", "60"], "WORKERS is 10, which nodes of"),
        (
            [COMMAND, "16", "8", "127.0.0.1", "8118", "2", "l", "True", "60"],
            "NODE_RANK is 2, .* nodes 0 to 1",
        ),
        ([COMMAND, "2", "80", "logs", "True", "60"], "PORT must lie between 1024 and 65535, got 80"),
        ([COMMAND, "2", "99999", "logs", "True", "60"], "PORT must lie .* got 99999"),
        (["python 'open", "2"], "COMMAND is not a command line"),
        (["", "2"], "COMMAND is empty"),
    ],
)
def test_wrong_arguments_are_sentences(fake_bin, tmp_path, words, message):
    result = bash(LAUNCHER, *words, cwd=tmp_path, path=fake_bin)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.search(message, result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]  # nothing was started or made


@pytest.fixture
def port():
    """A port that a program listens on, as an earlier job's scheduler does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize("join", ["True", "False"])
def test_a_port_in_use_is_named_with_a_free_one(fake_bin, tmp_path, port, join):
    result = bash(LAUNCHER, COMMAND, "2", port, "logs", join, "60", cwd=tmp_path, path=fake_bin)
    assert (result.returncode, result.stdout) == (1, "")
    free = re.fullmatch(f"error: PORT {port} of 127.0.0.1 is in use.*; (\\d+) is free: .*\n", result.stderr)
    with socket.create_server(("127.0.0.1", int(free[1]))):
        pass  # it is
    assert not (tmp_path / "logs").exists()


def test_another_node_does_not_open_the_port(fake_bin, tmp_path, port):
    words = ["16", "8", "127.0.0.1", port, "1", "logs", "True", "60"]
    assert bash(LAUNCHER, COMMAND, *words, cwd=tmp_path, path=fake_bin).returncode == 0


@pytest.mark.parametrize("kind", ["file", "below_a_file", "in_use"])
def test_logs_that_cannot_be_written_are_an_error(fake_bin, tmp_path, free_port, kind):
    logs = tmp_path / "logs"
    logs.mkdir() if kind == "in_use" else logs.touch()
    given = logs / "x" if kind == "below_a_file" else logs
    words = [COMMAND, "2", free_port, str(given), "True", "60"]
    with open(logs / "msrun.log" if kind == "in_use" else os.devnull, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = bash(LAUNCHER, *words, cwd=tmp_path, path=fake_bin)
    assert (result.returncode, result.stdout) == (1, "") and str(given) in result.stderr


RUN = "python run_mindformer.py --config a.yaml"


def test_the_screen_shows_the_first_workers_lines(fake_bin, tmp_path, free_port):
    """Our commands write them into TELECHAT_SCREEN; msrun's own words and the worker's log stay in files."""
    executable(
        fake_bin / "msrun",
        """\
        #!/bin/bash
        echo "Start worker process"
        for line in config: "step 1/2" "step 2/2"; do echo "$line" >>"$TELECHAT_SCREEN"; done
        echo "first rank $TELECHAT_FIRST_RANK, $TELECHAT_LOCAL_WORKERS here: $*" >>"$TELECHAT_SCREEN"
        """,
    )
    words = ["16", "8", "127.0.0.1", free_port, "1", "logs", "True", "60"]
    result = bash(LAUNCHER, RUN, *words, cwd=tmp_path, path=fake_bin)
    lines = result.stdout.splitlines()
    assert lines[:3] == ["config:", "step 1/2", "step 2/2"] and len(lines) == 4, result.stderr
    assert lines[3].startswith("first rank 8, 8 here: ") and "--tail_worker_log=-2" in lines[3]
    assert "Start worker process" in (tmp_path / "logs" / "msrun.log").read_text()
    verbose = bash(LAUNCHER, f"{RUN} --verbose", *words, cwd=tmp_path, path=fake_bin)
    assert verbose.stdout == "Start worker process\n"


def test_in_the_background_the_screen_is_a_file(fake_bin, tmp_path, free_port):
    result = bash(LAUNCHER, RUN, "2", free_port, "logs", "False", "60", cwd=tmp_path, path=fake_bin)
    assert "follow them with: tail -f logs/screen.log\n" in result.stdout


DYING = """\
    #!/bin/bash
    # a worker has ended; msrun waits for the scheduler, which waits for the worker
    echo "[ERROR] Worker process 123 exit with exception. Error code: {code}." >&2
    MS_ROLE=MS_SCHED sleep 100
    exit 1
    """


def test_an_earlier_jobs_failure_is_not_this_ones(fake_bin, tmp_path, free_port):
    """In the same LOG_DIR: its words must not end the new scheduler."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "msrun.log").write_text("Worker process 1 exit with exception. Error code: -9.\n")
    executable(fake_bin / "msrun", "#!/bin/bash\nMS_ROLE=MS_SCHED sleep 6\n")
    result = bash(LAUNCHER, RUN, "2", free_port, "logs", "True", "60", cwd=tmp_path, path=fake_bin)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [("1", "ValueError: no such rank", "a worker failed.*ValueError: no such rank"),
     ("-9", "step 3", "ended by signal 9, perhaps for want of memory.*step 3")],
)  # fmt: skip
def test_a_dead_worker_ends_the_job_without_the_schedulers_hours(
    fake_bin, tmp_path, free_port, code, log, said
):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker_1.log").write_text(f"{log}\n")
    (tmp_path / "logs" / "worker_7.log").write_text("RuntimeError: of an earlier job with more workers\n")
    executable(fake_bin / "msrun", DYING.format(code=code))
    began = time.monotonic()
    words = [COMMAND, "2", "1", "127.0.0.1", free_port, "1", "logs", "True", "60"]
    result = bash(LAUNCHER, *words, cwd=tmp_path, path=fake_bin)
    assert result.returncode == 1 and time.monotonic() - began < 40
    assert re.search(said, result.stderr, re.DOTALL) and "earlier job" not in result.stderr


WAITING = """\
    #!/bin/bash
    # a training, if its first worker has said so, saves and ends when the file "stop" is there
    trap 'echo "ended by msrun" >>"$TELECHAT_SCREEN"; exit 0' INT
    {begins}
    echo "first step" >>"$TELECHAT_SCREEN"
    until [[ -e $TELECHAT_ERRORS/stop ]]; do sleep 0.1; done
    {saves}
    """
SAVES = 'echo "saved" >>"$TELECHAT_SCREEN"'
FAILS = 'echo "error: the disk is full" >"$TELECHAT_ERRORS/rank_0"; exit 1'
HANGS = "while :; do sleep 0.1; done"


@pytest.mark.parametrize(
    ("begins", "saves", "times", "shown", "said"),
    [
        ('touch "$TELECHAT_ERRORS/trains"', SAVES, 1, "saved", None),
        ('touch "$TELECHAT_ERRORS/trains"', FAILS, 1, "first step", "error: the disk is full"),
        ('touch "$TELECHAT_ERRORS/trains"', HANGS, 2, "ended by msrun", "the workers are ended"),
        ("", SAVES, 1, "ended by msrun", "the workers are ended"),  # no training, or none yet
    ],
)
def test_ctrl_c_lets_a_training_save_and_ends_all_else(
    fake_bin, tmp_path, free_port, begins, saves, times, shown, said
):
    executable(fake_bin / "msrun", WAITING.format(begins=begins, saves=saves))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = ["bash", str(LAUNCHER), RUN, "2", free_port, "logs", "True", "60"]
    environment = os.environ | {"PATH": f"{fake_bin}:/usr/bin:/bin", "TMPDIR": str(temporary)}
    launcher = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    screen = tmp_path / "logs" / "screen.log"
    while not (screen.exists() and "first step" in screen.read_text()):
        assert launcher.poll() is None
        time.sleep(0.05)
    for _ in range(times):
        os.killpg(launcher.pid, signal.SIGINT)  # a terminal's, to the launcher and all in its group
        time.sleep(0.5)
    stdout, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode == 130 and stdout.splitlines()[-1] == shown
    assert (said in stderr) if said else "ended" not in stderr
    assert not any(temporary.iterdir())


def test_the_readme_command_keeps_its_quotes_and_loses_its_bare_newline(fake_bin, tmp_path, free_port):
    command = "python run.py --config a.yaml\n   --train_dataset /d/x.mindrecord"
    command += " \\\n --predict_data '<_start><_user>A B？<_bot>'"
    words = [command, "2", free_port, "logs", "True", "60"]
    lines = bash(LAUNCHER, *words, cwd=tmp_path, path=fake_bin).stdout.splitlines()
    expected = ["run.py", "--config", "a.yaml", "--train_dataset", "/d/x.mindrecord", "--predict_data"]
    assert lines[lines.index("run.py") :][:7] == [*expected, "<_start><_user>A B？<_bot>"]


def test_one_worker_runs_the_command_and_passes_its_status_on(fake_bin, tmp_path):
    executable(fake_bin / "job", '#!/bin/bash\necho "job $1 in $PYTHONPATH"\nexit 7\n')
    result = bash(LAUNCHER, "job 'a b'", "1", cwd=tmp_path, path=fake_bin, PYTHONPATH="/mine")
    assert (result.returncode, result.stdout) == (7, f"job a b in {CHECKOUT}:/mine\n")


def test_a_failed_job_fails_the_launcher_with_the_workers_words(fake_bin, tmp_path, free_port):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker_0.log").write_text("fine\nerror: there is no data set /x\n")
    words = [COMMAND, "2", free_port, "logs", "True", "60"]
    result = bash(LAUNCHER, *words, cwd=tmp_path, path=fake_bin, MSRUN_STATUS="3")
    assert result.returncode == 3
    assert "error: there is no data set /x" in result.stderr


def test_an_absent_msrun_is_a_sentence(tmp_path):
    result = bash(LAUNCHER, COMMAND, "2", cwd=tmp_path, path=tmp_path)
    assert result.returncode == 1 and "msrun is not on the PATH" in result.stderr


@pytest.fixture
def copy(tmp_path) -> Path:
    """A checkout of the scripts alone, in a path with a space and Chinese characters."""
    root = tmp_path / "my 模型 checkout"
    shutil.copytree(CHECKOUT / "scripts", root / "scripts")
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "constraints.txt").write_text("numpy<2\n")
    return root


FAKE_PYTHON = f"""\
    #!/bin/bash
    # stands in for an environment's python: notes what pip is asked, imports nothing
    echo "python $*" >>"$CALLS"
    case "$*" in
        *"import torch"* | *urlopen*) exit 1 ;;
        *"pip install"*) exit "${{PIP_STATUS:-0}}" ;;
        *"-m venv"*) mkdir -p "$3/bin" && echo "export VIRTUAL_ENV='$3'" >"$3/bin/activate" ;;
        --version) echo "Python 3.11" ;;
        *) exec {sys.executable} "$@" ;;
    esac
    """


def setup(
    copy: Path, fake_bin: Path, unasked: str = "refuse", **variables: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Source setup_env.sh in ``copy``; what it wrote, and what it asked of pip and venv.

    ``unasked``: what the sourcing script does to a foreign environment where nobody can be asked.
    """
    for name in ("python", "python3.11"):
        executable(fake_bin / name, FAKE_PYTHON)
    calls = copy.parent / "calls"
    calls.write_text("")
    variables = {"VIRTUAL_ENV": "", "CONDA_PREFIX": "", "CALLS": str(calls)} | variables
    command = f"set -eu; setup_unasked={unasked}; source '{copy}/scripts/setup_env.sh'"
    result = bash("-c", command, cwd=copy, path=fake_bin, **variables)
    asked = [line for line in calls.read_text().splitlines() if "pip install" in line or "venv" in line]
    return result, asked


def installed(copy: Path) -> str:
    return f"python -m pip install --constraint {copy}/constraints.txt -e {copy}[test]"


def test_an_environment_is_made_and_filled_once(copy, fake_bin):
    result, asked = setup(copy, fake_bin)
    assert result.returncode == 0, result.stderr
    assert asked == [f"python -m venv {copy}/.venv", installed(copy)]
    stamp = (copy / ".venv" / "telechat2_installed").read_text().split()
    assert stamp[0] == hashlib.sha256(b"[project]\nnumpy<2\n").hexdigest()
    assert setup(copy, fake_bin)[1] == []  # a second run installs nothing
    for name in ("pyproject.toml", "constraints.txt"):  # one with new pins does
        (copy / name).write_text("[project]\nname = 'x'\n")
        assert setup(copy, fake_bin)[1] == [installed(copy)]


def test_an_active_environment_is_used(copy, fake_bin, tmp_path):
    active = tmp_path / "active"
    active.mkdir()
    result, asked = setup(copy, fake_bin, "install", VIRTUAL_ENV=str(active))
    assert result.returncode == 0 and asked == [installed(copy)]
    assert (active / "telechat2_installed").is_file() and not (copy / ".venv").exists()


@pytest.mark.parametrize("kind", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_nothing_is_installed_into_a_foreign_environment_unasked(copy, fake_bin, tmp_path, kind):
    active = tmp_path / "active"
    active.mkdir()
    result, asked = setup(copy, fake_bin, **{kind: str(active)})
    assert (result.returncode, asked, [*active.iterdir()]) == (1, [], [])
    assert str(active) in result.stderr and "--yes" in result.stderr and str(copy / ".venv") in result.stderr
    (active / "telechat2_installed").write_text("pins  - /another/checkout\n")
    assert setup(copy, fake_bin, **{kind: str(active)})[1] == []  # one of its environments is not ours, too
    (active / "telechat2_installed").write_text(f"earlier pins  - {copy}\n")  # it was allowed
    assert len(setup(copy, fake_bin, **{kind: str(active)})[1]) == 1


@pytest.mark.parametrize(("answer", "asked"), [("y\n", 1), ("\n", 0), ("n\n", 0)])
def test_on_a_terminal_the_question_is_asked(copy, fake_bin, tmp_path, answer, asked):
    active = tmp_path / "active"
    active.mkdir()
    executable(fake_bin / "python", FAKE_PYTHON)
    calls = tmp_path / "calls"
    calls.write_text("")
    environment = os.environ | {"VIRTUAL_ENV": str(active), "CALLS": str(calls)}
    environment["PATH"] = f"{fake_bin}:/usr/bin:/bin"
    ours, theirs = os.openpty()
    os.write(ours, answer.encode())
    command = ["bash", "-c", f"set -eu; source '{copy}/scripts/setup_env.sh'"]
    told = subprocess.run(command, env=environment, cwd=copy, stdin=theirs, stderr=theirs, timeout=60)
    said = os.read(ours, 4096).decode()
    os.close(ours), os.close(theirs)
    assert f"into the active environment {active}?" in said
    assert calls.read_text().count("pip install") == asked and (told.returncode == 0) == bool(asked)


def test_a_foreign_environment_that_has_everything_is_used_as_it_is(copy, fake_bin, tmp_path):
    from importlib.metadata import version

    active = tmp_path / "active"
    active.mkdir()
    (copy / "pyproject.toml").write_text(f'[project]\ndependencies = ["numpy=={version("numpy")}"]\n')
    result, asked = setup(copy, fake_bin, VIRTUAL_ENV=str(active))
    assert (result.returncode, asked, [*active.iterdir()]) == (0, [], [])
    (copy / "pyproject.toml").write_text('[project]\ndependencies = ["numpy==0.1"]\n')
    assert setup(copy, fake_bin, VIRTUAL_ENV=str(active))[0].returncode == 1


def test_an_environment_in_the_making_is_finished(copy, fake_bin):
    """Interrupted in venv there is no activate yet; interrupted in pip there is no stamp."""
    (copy / ".venv").mkdir()
    (copy / ".venv" / "telechat2_created").touch()
    result, asked = setup(copy, fake_bin)
    assert result.returncode == 0 and len(asked) == 2, result.stderr
    (copy / ".venv" / "telechat2_installed").unlink()
    assert len(setup(copy, fake_bin)[1]) == 1


def test_a_folder_that_is_no_environment_is_not_filled(copy, fake_bin):
    (copy / ".venv").mkdir()
    (copy / ".venv" / "mine").touch()
    result, asked = setup(copy, fake_bin)
    assert (result.returncode, asked) == (1, []) and "is no Python environment" in result.stderr


def test_an_environment_of_a_checkout_that_was_moved_is_named(copy, fake_bin, tmp_path):
    """Its ``activate`` holds the old path, and would leave the system's python active."""
    setup(copy, fake_bin)
    moved = copy.rename(tmp_path / "moved 模型")
    result, asked = setup(moved, fake_bin)
    assert (result.returncode, asked) == (1, [])
    assert f"{moved}/.venv" in result.stderr and f"{copy}/.venv" in result.stderr and "rm -r" in result.stderr


def test_condas_base_is_no_active_environment(copy, fake_bin, tmp_path):
    base = tmp_path / "conda"
    base.mkdir()
    conda = {"CONDA_PREFIX": str(base), "CONDA_DEFAULT_ENV": "base"}
    assert setup(copy, fake_bin, **conda)[1][0] == f"python -m venv {copy}/.venv"
    assert not any(base.iterdir())
    _, asked = setup(copy, fake_bin, "install", **conda | {"CONDA_DEFAULT_ENV": "telechat"})
    assert asked == [installed(copy)]
    assert (base / "telechat2_installed").is_file()


def test_a_failed_install_is_a_sentence_and_is_tried_again(copy, fake_bin):
    result, _ = setup(copy, fake_bin, PIP_STATUS="1")
    assert result.returncode == 1 and "error: pip could not install" in result.stderr
    assert len(setup(copy, fake_bin)[1]) == 1


def test_a_missing_python_is_a_sentence(copy, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "sha256sum", "uname"):
        (tools / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(tools)}
    command = ["bash", "-c", f"source '{copy}/scripts/setup_env.sh'"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no Python 3.11 found on the PATH")
    assert not (copy / ".venv").exists()
