"""What a run shows: its own lines on the screen, and all that the libraries write in a file.

MindFormers and MindSpore write some 500 lines before the first loss, from Python and from C++. While a task
runs, the standard output and error of the process (file descriptors 1 and 2) are
``<output_dir>/log/run.log``. ``sys.stdout`` and ``sys.stderr``, where this plugin prints, are the screen and
that file. A worker of msrun keeps its descriptors, which are its worker_N.log; its screen is the launcher's
file ``TELECHAT_SCREEN``.
"""

import io
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from research.telechat2.checkpoint.loading import NO_WEIGHTS
from research.telechat2.common.errors import UsageError

# Warnings of MindFormers and MindSpore about what this plugin chooses or replaces; they stay in the log.
EXPECTED = re.compile(
    r"The input config \w+ is empty|Some configs in yaml are useless|is deprecated|will be deprecated"
    r"|Input model name is not in the supported list|See the list of supported task|The default model config"
    r"|use_legacy_format is automatically|Lazy Inline|Sink mode is False, per epoch size is invalid"
    r"|full_batch could only be used under|It will download files from openMind Hub|print_separate_loss"
    r"|No module named 'hyper_parallel'|Start to save optimizer weight|bind core policy"
    r"|Some configs are not|When using the .*ByteMindDataset|pipeline stages: \d+ > 1, the loss on the last"
    r"|methods may not be supported in later version"
    r"|does not have a convert_name method|make sure remove_redundancy is consistent"
    r"|^CPU device is not supported|Distributed job is spawned|Strategy files are only generated for"
)
LONGEST = 600  # characters of a warning on the screen
_NOT_LOADED = re.compile(
    r"No source parameters found for dst_param: (.+), skipping|\[(.*)\] are not loaded\."
)

bars: list = []  # the bar of a training on a terminal (tqdm), which text must not tear


class Both:
    """A text stream that writes to the screen and to the log; a screen that is gone is given up."""

    def __init__(self, screen, log):
        self.screen, self.log = screen, log
        self.encoding = getattr(log, "encoding", "utf-8")
        self.errors = getattr(log, "errors", "replace")

    def write(self, text: str) -> int:
        self.log.write(text)
        for bar in bars:
            bar.clear()
        if self.screen:
            try:
                self.screen.write(text)
            except OSError:  # a closed terminal must not end a training
                self.screen = None
        for bar in bars:
            if text.endswith("\n"):
                bar.refresh()
        return len(text)

    def flush(self) -> None:
        self.log.flush()
        if self.screen:
            try:
                self.screen.flush()
            except OSError:
                self.screen = None

    def isatty(self) -> bool:
        return bool(self.screen) and self.screen.isatty()

    def fileno(self) -> int:
        """The log's descriptor: what a child process may write to."""
        return self.log.fileno()


def is_expected(text: str, resuming: bool = False) -> bool:
    """Whether a warning of the libraries tells nothing that a user could change.

    So do warnings that parameters are not loaded which no checkpoint needs to hold. Loading a resumed run's
    optimizer warns of all weights: they are in the other file, and have been compared.
    """
    if EXPECTED.search(text) or "parameters in the 'net' are not loaded" in text:
        return True  # of those that are not loaded this is the number: the next message names them
    if not (found := _NOT_LOADED.fullmatch(text)):
        return False
    names = [name.strip(" '") for name in (found[1] or found[2]).split(",")]
    return (resuming and bool(found[2])) or all(name.endswith(NO_WEIGHTS) for name in names)


class _Warnings(logging.Handler):
    """Shows warnings and errors of the libraries on the screen, each text once."""

    def __init__(self, screen, resuming: bool):
        super().__init__(logging.WARNING)
        self.screen, self.resuming, self.shown = Both(screen, io.StringIO()), resuming, set()

    def emit(self, record):
        text = record.getMessage()
        if text in self.shown or is_expected(text, self.resuming):
            return
        self.shown.add(text)
        more = f"… ({len(text)} characters, all in the log)" if len(text) > LONGEST else ""
        self.screen.write(f"{record.levelname.lower()} (of the libraries): {text[:LONGEST]}{more}\n")
        self.screen.flush()


@contextmanager
def shown_by_launcher(verbose: bool) -> Iterator[None]:
    """In the first worker of a node, repeat what is printed in the launcher's file; elsewhere nothing."""
    before = sys.stdout, sys.stderr
    if not verbose and os.environ.get("RANK_ID") == os.environ.get("TELECHAT_FIRST_RANK", "0"):
        repeat_for_launcher(True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def repeat_for_launcher(on: bool) -> None:
    """Begin or end to repeat in the launcher's file what this worker of msrun prints, if it is one."""
    path = os.environ.get("TELECHAT_SCREEN")
    if not path or os.environ.get("MS_ROLE") != "MS_WORKER":
        return
    if on and not isinstance(sys.stdout, Both):
        screen = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        sys.stdout, sys.stderr = Both(screen, sys.stdout), Both(screen, sys.stderr)
    elif not on and isinstance(sys.stdout, Both):
        sys.stdout, sys.stderr = sys.stdout.log, sys.stderr.log


def launcher_shows(rank: int) -> bool:
    """Whether the launcher of this node has the worker of that rank."""
    first, count = (os.environ.get(f"TELECHAT_{name}", "0") for name in ("FIRST_RANK", "LOCAL_WORKERS"))
    return 0 <= rank - int(first) < int(count)


@contextmanager
def own_lines(output_dir: str, verbose: bool, resuming: bool = False) -> Iterator[None]:
    """Import MindFormers and carry out a task with only this plugin's lines on the screen.

    Warnings and errors of the libraries are shown as well, but for those that are expected.

    Raises:
        OSError: the log cannot be written.
    """
    if verbose or "MS_ROLE" in os.environ:
        screen = sys.stdout.screen if isinstance(sys.stdout, Both) else None
        with _shown_warnings(screen, resuming) if screen else nullcontext():
            yield
        return
    path = Path(output_dir) / "log" / "run.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115
    log.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n")
    print(f"log: {path} (all that MindFormers and MindSpore write; --verbose shows it)", flush=True)
    before, screens = (sys.stdout, sys.stderr), []
    for stream, descriptor in zip(before, (1, 2), strict=True):
        stream.flush()
        screens.append(_kept(stream, descriptor))
    descriptors = [os.dup(1), os.dup(2)]
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        sys.stdout, sys.stderr = (Both(screen, log) for screen in screens)
        with _shown_warnings(screens[1], resuming):
            yield
    except Exception as error:
        if not isinstance(error, (UsageError, OSError)):  # a defect, whose reason the libraries may have told
            print(f"log: {path} has all that was written until then", file=screens[1], flush=True)
        raise
    finally:
        log.flush()
        sys.stdout, sys.stderr = before
        for descriptor, kept in enumerate(descriptors, start=1):
            os.dup2(kept, descriptor)
            os.close(kept)


def _kept(stream, descriptor: int):
    """A stream to where ``stream`` writes, also when ``descriptor`` leads elsewhere."""
    try:
        own = stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        own = False
    if not own:
        return stream
    copy = os.dup(descriptor)
    return open(copy, "w", buffering=1, encoding=stream.encoding, errors=stream.errors)  # noqa: SIM115


@contextmanager
def _shown_warnings(screen, resuming: bool) -> Iterator[None]:
    """Import MindFormers; show of what it and MindSpore's Python code log the warnings on ``screen``."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream.log for stream in streams)  # which the libraries' loggers keep
    from mindspore.log import _get_logger

    for handler in _get_logger().handlers:
        if isinstance(stream := getattr(handler, "stream", None), Both):  # imported before
            handler.setStream(stream.log)
    from research.telechat2.compat.library import get_logger

    sys.stdout, sys.stderr = streams
    handler = _Warnings(screen, resuming)
    loggers = _get_logger(), get_logger()
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
