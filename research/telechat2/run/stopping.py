"""Ctrl-C in a training: the first finishes the step and saves, the second ends at once.

A scheduler that ends a job, or a terminal that is closed, leaves a checkpoint too: common/interrupts.py takes
their signals for Ctrl-C. One of several processes never stops alone, for the others would wait for it: they
agree on a step, by the launcher's folder.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from research.telechat2.common.files import atomic_write
from research.telechat2.common.interrupts import listen_again, tolerating
from research.telechat2.run.processes import is_first_process

_ANSWER = "\nCtrl-C: this step is finished, and a checkpoint saved. Ctrl-C again: the end, at once."


@dataclass
class StopRequest:
    """Whether a training was asked to stop, and what it has saved since.

    Attributes:
        alone: this process is the whole run. Of several, none may leave with an error when all stop.
        steps: done so far by this run.
        saved: the last checkpoint that it has saved; None: none yet.
        by_launcher: the processes of a node stop together.
    """

    alone: bool = True
    steps: int = 0
    saved: Path | None = None
    by_launcher: bool = False
    _pressed: Callable[[], int] = field(default=lambda: 0)
    _handling: ExitStack = field(default_factory=ExitStack)

    @property
    def requested(self) -> bool:
        """Whether the run stops at the end of this step."""
        return self.by_launcher or self._pressed() > 0

    def begin(self) -> None:
        """A step is trained from now on: Ctrl-C, here or at the launcher, saves it."""
        if self.alone:
            self._pressed = self._handling.enter_context(tolerating(1, _ANSWER))
        elif (folder := _launcher_folder()) and is_first_process():
            (folder / "trains").touch()

    def begin_step(self) -> None:
        """MindSpore's data set has taken SIGINT when the first step begins."""
        if self.alone:
            listen_again()

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
            self.by_launcher = True
        return self.requested


def _launcher_folder() -> Path | None:
    """Where the launcher waits for its workers, if all processes of the run are this node's."""
    folder = os.environ.get("TELECHAT_ERRORS")
    alone = os.environ.get("TELECHAT_LOCAL_WORKERS") == os.environ.get("MS_WORKER_NUM")
    return Path(folder) if folder and alone and os.environ.get("MS_ROLE") == "MS_WORKER" else None


@contextmanager
def stopping(alone: bool = True) -> Iterator[StopRequest]:
    """Around a training: Ctrl-C ends it as ever, until a step is trained."""
    stop = StopRequest(alone)
    with stop._handling:
        yield stop


def resuming_command(argv: list[str], folder: Path) -> str:
    """The command ``argv`` again, for a shell, resuming from ``folder``; what it chose itself is left out."""
    flag = "--resume_training"
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
