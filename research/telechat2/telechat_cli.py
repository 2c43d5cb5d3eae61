"""What every command shares: how it ends for a user's mistake, and how it keeps the libraries quiet."""

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from research.telechat2.common.environment import PACKAGES, VERSIONS, remedy


def run(main: Callable[[], None]) -> None:
    """Call ``main`` and end the process: 0 on success, 1 for a mistake a user can mend, 130 for Ctrl-C.

    ``ValueError`` and ``OSError`` are the errors a user can cause (see the house rules); anything else
    is a defect of ours and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        _report(f"error: {error}")
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in {**PACKAGES, **VERSIONS}:
            raise
        _report(f"error: {package}: not installed in this Python ({sys.executable}); {remedy()}.")
        sys.exit(1)
    sys.exit(0)


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
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's affair
        return
    interrupted = []

    def note(*_) -> None:
        if not interrupted:
            print(f"interrupted; ending as soon as {what}", file=sys.stderr, flush=True)
        interrupted.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt


def quiet_libraries() -> None:
    """Keep MindFormers' and MindSpore's progress notes off the terminal; call before their first import.

    MindFormers writes ``output/log`` into the working directory when it is imported, unless LOG_MF_PATH
    says otherwise; MindSpore writes ``rank_0/om`` when a compilation fails, unless MS_OM_PATH does. Both
    go to a directory of this process, removed at its end. Errors are still shown, and the plugin's own
    warnings, which have a logger of their own.
    """
    os.environ.setdefault("GLOG_v", "3")
    scratch = tempfile.mkdtemp(prefix="telechat_")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ.setdefault("LOG_MF_PATH", scratch)
    os.environ.setdefault("MS_OM_PATH", scratch)
    # MindFormers names its logger after its log directory, and sets its level anew when it is imported.
    log_path = os.path.expanduser(os.environ["LOG_MF_PATH"])
    logging.getLogger(f"mindformers{log_path}").addFilter(lambda record: record.levelno >= logging.ERROR)
