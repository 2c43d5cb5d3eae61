"""What every command shares: how it ends for a user's mistake, and how it keeps the libraries quiet."""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from research.telechat2.common.environment import PACKAGES, VERSIONS, remedy
from research.telechat2.common.errors import UsageError
from research.telechat2.common.interrupts import (
    STATUS,
    half_imported,
    interrupted,
    leave,
    listening,
    temporary_folder,
    tolerating,
)


def run(main: Callable[[], None]) -> None:
    """Call ``main`` and end the process: 0 on success, 1 for a mistake a user can mend, 130 for Ctrl-C.

    ``UsageError`` is a user's mistake, ``OSError`` the system's refusal (a full disk, a missing permission);
    anything else is a defect of ours and keeps its traceback.
    """
    with listening():
        try:
            main()
        except KeyboardInterrupt as interrupt:
            _end_interrupted(str(interrupt))
        except Exception as error:
            if interrupted():  # an import that Ctrl-C has broken off raises what it likes
                _end_interrupted()
            _report(f"error: {_sentence(error)}")
            sys.exit(1)
    sys.exit(0)


def _sentence(error: Exception) -> str:
    """What a user's mistake says; what is none is raised again."""
    if isinstance(error, UsageError | OSError):
        return str(error)
    package = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in {**PACKAGES, **VERSIONS}:
        return f"{package}: not installed in this Python ({sys.executable}); {remedy()}."
    raise error


def _end_interrupted(sentence: str = "") -> None:
    sentence = sentence or "interrupted"
    if half_imported():  # what such a library does at the end, fails
        leave(sentence)
    print(sentence, file=sys.stderr)
    sys.exit(STATUS)


def _report(sentence: str) -> None:
    """Say what is wrong: for a worker whose launcher waits in a file, so that it says once what all found."""
    folder = os.environ.get("TELECHAT_ERRORS")
    if folder and os.environ.get("MS_ROLE") == "MS_WORKER":
        Path(folder, f"rank_{os.environ.get('RANK_ID', os.getpid())}").write_text(f"{sentence}\n", "utf-8")
    else:
        print(sentence, file=sys.stderr)


@contextmanager
def interrupt_afterwards(what: str) -> Iterator[None]:
    """Hold Ctrl-C back while ``what`` is done, which would crash in the middle: KeyboardInterrupt follows it.

    So it is while MindSpore is imported: its C++ code ends the process when a module half done is left.
    """
    with tolerating(math.inf, f"interrupted; ending as soon as {what}") as pressed:
        yield
        count = pressed()
    if count:
        raise KeyboardInterrupt


def quiet_libraries() -> None:
    """Keep MindFormers' and MindSpore's progress notes off the terminal; call before their first import.

    MindFormers writes ``output/log`` into the working directory when it is imported, unless LOG_MF_PATH
    says otherwise; MindSpore writes ``rank_0/om`` when a compilation fails, unless MS_OM_PATH does. Both
    go to a directory of this process, removed at its end. Errors are still shown, and the plugin's own
    warnings, which have a logger of their own.
    """
    os.environ.setdefault("GLOG_v", "3")
    scratch = temporary_folder("telechat_")
    os.environ.setdefault("LOG_MF_PATH", scratch)
    os.environ.setdefault("MS_OM_PATH", scratch)
    # MindFormers names its logger after its log directory, and sets its level anew when it is imported.
    log_path = os.path.expanduser(os.environ["LOG_MF_PATH"])
    logging.getLogger(f"mindformers{log_path}").addFilter(lambda record: record.levelno >= logging.ERROR)
