"""Ctrl-C in a command: status 130, one word, no temporary folder; whatever the command is doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
HEAD = """
import hashlib, os, signal, sys, time
from research.telechat2.common.interrupts import prompting, temporary_folder, tolerating
from research.telechat2.common.cli import run

def main():
    temporary_folder("telechat_")
    print("begun", flush=True)
"""
BODIES = {
    "Python": "time.sleep(60)",
    "C, where no handler is called": "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)",
    "an import that raises another error": """
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("initialization failed")""",
    "MindSpore, which sends the process SIGTERM": """
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    time.sleep(60)""",
    "a library half imported": """
    sys.modules["mindspore.half"] = sys
    import atexit
    atexit.register(lambda: 1 / 0)
    time.sleep(60)""",
}


def start(body: str, folder: Path, **how) -> subprocess.Popen:
    lines = "\n".join(f"    {line}" if not line.startswith("    ") else line for line in body.splitlines())
    environment = {key: value for key, value in os.environ.items() if key != "MS_ROLE"}
    job = subprocess.Popen(
        [sys.executable, "-c", f"{HEAD}{lines}\n\nrun(main)"], cwd=CHECKOUT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment | {"TMPDIR": str(folder)}, **how,
    )  # fmt: skip
    assert job.stdout.readline() == "begun\n"
    time.sleep(0.2)
    return job


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_is_ended(tmp_path, number):
    job = start(BODIES["Python"], tmp_path)
    job.send_signal(number)
    _, told = job.communicate(timeout=20)
    assert (job.returncode, told, os.listdir(tmp_path)) == (130, "interrupted\n", [])


@pytest.mark.parametrize("body", list(BODIES.values())[1:], ids=list(BODIES)[1:])
def test_a_command_is_ended_whatever_it_does(tmp_path, body):
    job = start(body, tmp_path)
    job.send_signal(signal.SIGINT)
    _, told = job.communicate(timeout=20)
    assert (job.returncode, told, os.listdir(tmp_path)) == (130, "interrupted\n", [])


def test_what_nohup_ignores_stays_ignored(tmp_path):
    job = start("time.sleep(2)", tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    job.send_signal(signal.SIGINT)
    _, told = job.communicate(timeout=20)
    assert (job.returncode, told, os.listdir(tmp_path)) == (0, "", [])


def test_signals_of_child_processes_are_their_own(tmp_path):
    """A pool is ended by SIGTERM: that is no Ctrl-C of the command, whose children fall silent."""
    body = """
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(abs, [-1, 2]), flush=True)
    pool.join()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join()
    time.sleep(2.5)
    print(child.exitcode, flush=True)"""
    out, told = start(body, tmp_path).communicate(timeout=20)
    assert (out, told, os.listdir(tmp_path)) == ("[1, 2]\n-15\n", "", [])


def test_what_may_be_stopped_goes_on(tmp_path):
    """The first stops what tolerates it, though no handler was called for long; a prompt goes on, too."""
    body = """
    with tolerating(1) as pressed:
        until = time.monotonic() + 4
        while time.monotonic() < until:
            hashlib.pbkdf2_hmac('sha256', b'x', b'y', 4 * 10**6)
        print(pressed(), flush=True)
    with prompting():
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(3)
            print("on", flush=True)"""
    job = start(body, tmp_path)
    job.send_signal(signal.SIGINT)
    assert job.stdout.readline() == "1\n"
    time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    out, told = job.communicate(timeout=20)
    assert (job.returncode, out, told) == (0, "on\n", "")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_second_ends_what_tolerates_one(tmp_path, second):
    """The first is answered at once, though no handler is called."""
    body = "with tolerating(1, 'once more'):\n        hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)"
    job = start(body, tmp_path)
    job.send_signal(signal.SIGINT)
    assert job.stderr.readline() == "once more\n"
    job.send_signal(second)
    _, told = job.communicate(timeout=20)
    assert (job.returncode, told, os.listdir(tmp_path)) == (130, "interrupted\n", [])


def test_the_second_ends_what_swallows_it(tmp_path):
    """C++ that calls Python, as a compiler of graphs, loses the exception."""
    body = """
    with tolerating(1):
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                time.sleep(1)
            except KeyboardInterrupt:
                pass"""
    job = start(body, tmp_path)
    for _ in range(2):
        job.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, told = job.communicate(timeout=20)
    assert (job.returncode, told, os.listdir(tmp_path)) == (130, "interrupted\n", [])
