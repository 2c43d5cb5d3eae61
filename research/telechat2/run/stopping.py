"""Ctrl-C in a training: the first finishes the step and saves, the second ends at once.

MindSpore handles SIGINT itself while a graph runs, by sending the process SIGTERM: so both are handled here,
and a scheduler that ends a job, or a terminal that is closed, leaves a checkpoint too. One of several
processes never stops alone, for the others would wait for it: they agree on a step, by the launcher's folder.
"""

import atexit
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from research.telechat2.common.files import atomic_write
from research.telechat2.run.processes import is_first_process

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 5.0  # seconds in which a run ends by itself after a second Ctrl-C


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence for the user; the command's exit status is 130."""


class StopRequest:
    """Whether the run was asked to stop, and what it has saved since.

    Attributes:
        requested: by a first Ctrl-C.
        by_launcher: the processes of a node stop together; none may leave with an error meanwhile.
        left: the handler has raised Interrupted; MindSpore's import makes an ImportError of it.
        saves: whether a step is trained now, after which a checkpoint can be saved.
        steps: done so far by this run.
        saved: the last checkpoint that it has saved; None: none yet.
    """

    def __init__(self):
        self.signals: list[int] = []
        self.requested = self.by_launcher = self.left = False
        self.saves = False
        self.steps = 0
        self.saved: Path | None = None

    def ask(self, *_) -> None:
        """The handler of both signals.

        Raises:
            Interrupted: it is the second, or there is nothing to save.
        """
        if self.requested or not self.saves:
            self.left = True
            raise Interrupted
        self.requested = True

    def begin(self) -> None:
        """A step is trained from now on: Ctrl-C, here or at the launcher, saves it."""
        self.saves = True
        if (folder := _launcher_folder()) and is_first_process():
            (folder / "trains").touch()

    def is_due(self, step: int) -> bool:
        """Whether the run stops after ``step``, which has ended.

        The launcher writes a file; the first process answers with the step after which all stop. It is the
        one after the next: no other process can end that before the first has begun it.
        """
        if (folder := _launcher_folder()) is None:
            return self.requested
        agreed = folder / "stop_after"
        if is_first_process() and (folder / "stop").exists() and not agreed.exists():
            with atomic_write(agreed) as temporary:
                temporary.write_text(str(step + 2), encoding="utf-8")
        if agreed.exists() and step >= int(agreed.read_text(encoding="utf-8")):
            self.requested = self.by_launcher = True
        return self.requested

    def listen(self) -> None:
        """Handle the signals that are not ignored, where this process may stop alone."""
        for number in self.signals:
            signal.signal(number, self.ask)


STOP = StopRequest()


def _launcher_folder() -> Path | None:
    """Where the launcher waits for its workers, if all processes of the run are this node's."""
    folder = os.environ.get("TELECHAT_ERRORS")
    alone = os.environ.get("TELECHAT_LOCAL_WORKERS") == os.environ.get("MS_WORKER_NUM")
    return Path(folder) if folder and alone and os.environ.get("MS_ROLE") == "MS_WORKER" else None


@contextmanager
def stopping(alone: bool = True) -> Iterator[StopRequest]:
    """Handle Ctrl-C by ``STOP``, new for each training; not in one of several processes, nor in a thread."""
    STOP.__init__()
    if not alone or threading.current_thread() is not threading.main_thread():
        yield STOP
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    STOP.signals = [number for number, handler in before.items() if handler != signal.SIG_IGN]  # nohup
    STOP.listen()
    ends = os.pipe()
    os.set_blocking(ends[1], False)
    wakeup = signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
    ended = threading.Event()
    threading.Thread(target=_answer_signals, args=(ends[0], ended), daemon=True).start()
    try:
        yield STOP
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        os.close(ends[1])
        for number in STOP.signals:
            signal.signal(number, before[number] or signal.SIG_DFL)


def _answer_signals(received: int, ended: threading.Event) -> None:
    """Say what Ctrl-C does, and end the process at the second, in a thread of its own.

    No handler runs while MindSpore compiles or runs a graph; in these minutes a thread does.
    """
    count = 0
    while data := os.read(received, 16):
        count += sum(byte in _SIGNALS for byte in data)
        if count == 1 and STOP.saves:
            _tell("\nCtrl-C: this step is finished, and a checkpoint saved. Ctrl-C again: the end, at once.")
        if count > 1:
            if ended.wait(_PATIENCE):
                break
            _tell("interrupted at once; what was saved before stands")
            with suppress(Exception):
                atexit._run_exitfuncs()  # temporary folders
            os._exit(130)
    os.close(received)


def _tell(sentence: str) -> None:
    with suppress(OSError):  # a terminal that is closed
        print(sentence, file=sys.stderr, flush=True)


def resuming_command(argv: list[str], folder: Path) -> str:
    """The command ``argv`` again, for a shell, resuming from ``folder``; what it chose itself is left out."""
    flag = "--resume" if Path(argv[0]).name == "run_telechat.py" else "--resume_training"
    kept, rest = [], list(argv[1:])
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if _stands_for(name, "--load_checkpoint") or _stands_for(name, flag):
            if "=" not in word and rest:
                rest.pop(0)
        elif not word.startswith(("load_checkpoint=", "resume_training=")):  # words of --options
            kept.append(word)
    return shlex.join(["python", argv[0], *kept, "--load_checkpoint", str(folder), flag, "True"])


def _stands_for(name: str, flag: str) -> bool:
    """Whether argparse takes a word for a flag: the flag, or the start of it that no other flag has."""
    return name == flag or (flag.startswith(name) and len(name) > len("--re"))
