"""A prediction that scripts/msrun_launcher.sh starts, as a user types it."""

import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

from predict_model import CHECKOUT

INFER = "infer/run_telechat_predict.py"


def download_folder(random, vocab: Path, folder: Path) -> Path:
    """A Hugging Face folder with its tokenizer, as it is downloaded."""
    shutil.copytree(random.hf, folder)
    shutil.copy(vocab, folder / "tokenizer.model")
    return folder


def command(script: str, *words) -> str:
    """The quoted command of the launcher."""
    path = CHECKOUT / "research" / "telechat2" / script
    return shlex.join(["python", str(path if path.is_file() else CHECKOUT / script), *map(str, words)])


def launcher_words(line: str, processes: int, seconds: int = 120) -> list[str]:
    """The launcher's words for a job that is waited for; ``seconds`` is for the processes to meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = CHECKOUT / "scripts" / "msrun_launcher.sh"
    return ["bash", *map(str, (launcher, line, processes, port, "logs", True, seconds))]


def launch(line: str, processes: int, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    """Run a command by so many processes, and wait."""
    cwd.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "GLOG_"))}
    return subprocess.run(
        launcher_words(line, processes), cwd=cwd, input=stdin, capture_output=True, text=True, timeout=400,
        env=environment,
    )  # fmt: skip
