"""One training at a time in an output folder.

The lock is the operating system's: it ends with the process that holds it, however that ends. The first
process of a run holds it for all.
"""

import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import read_json

NAME = ".training.lock"


@contextmanager
def only_training_in(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made if need be; around the whole training.

    A file system without locks is printed, and trained on.

    Raises:
        UsageError: another training holds it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    file = _open_locked(path)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()  # before the lock is released: whoever waits for it opens the next file
            os.close(file)
        if is_new:
            with suppress(OSError):  # not empty: something was trained
                folder.rmdir()


def _open_locked(path: Path) -> int | None:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            os.close(file)
            raise UsageError(
                f"another training is writing into {path.parent} ({holder}): give another --output_dir, or "
                "wait until it has ended."
            ) from None
        except OSError as error:
            os.close(file)
            print(f"output_dir: {path.parent} is not locked against a second training ({error})", flush=True)
            return None
        if _is_still_there(file, path):
            break
        os.close(file)  # the one who held it removed the file meanwhile
    with suppress(OSError):  # a full disk: the lock holds without its text
        os.ftruncate(file, 0)
        os.write(file, json.dumps(_this_process(), ensure_ascii=False).encode())
    return file


def _is_still_there(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _this_process() -> dict:
    started = datetime.now().isoformat(" ", "seconds")
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": started,
        "command": shlex.join(sys.argv),
    }


def _holder(path: Path) -> str:
    try:
        known = read_json(path) or {}
        return f"process {known['process']} on {known['host']}, since {known['since']}: {known['command']}"
    except (OSError, UsageError, KeyError):
        return "its process is not known"
