"""Ctrl-C in a command: it ends with status 130 and leaves no temporary folder, whatever it is doing.

MindSpore handles SIGINT itself while a graph runs, by sending the process SIGTERM, which would kill it: so
both mean Ctrl-C. No handler of Python runs while C++ compiles or runs a graph: there a thread ends the
process. An import of C++ that is interrupted may raise another error, or leave what crashes at the very end.
"""

import atexit
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

STATUS = 130
_PATIENCE = 2.0  # seconds after which a Ctrl-C that no handler has heard ends the process
_UNWIND = 5.0  # seconds in which a Ctrl-C that was heard leaves what tolerated an earlier one
_SLACK = 1.0  # seconds that the watching thread may be late
_NUDGE = 0.2  # seconds after which a prompt that has not heard a signal is woken
_folders: list[str] = []


class _Interrupts:
    """What the running command was asked.

    Attributes:
        count: how often its handler was called, since ``tolerating`` began or the command.
        tolerated: how often it may be without ending the command.
        answer: what is printed at the first.
        leaving: whether it was called more often.
        handled: signals that mean Ctrl-C.
        pressed, heard: when Ctrl-C was pressed, and when the handler was called last; seconds.
        at_a_prompt: whether a person types.
        last_call: held by the thread that ends the process.
    """

    def __init__(self) -> None:
        self.count, self.leaving, self.answer = 0, False, ""
        self.tolerated: float = 0
        self.pressed: list[float] = []
        self.handled: list[int] = []
        self.heard = -math.inf
        self.at_a_prompt = False
        self.process = os.getpid()
        self.last_call = threading.Lock()

    def ask(self, number: int, frame: object) -> None:
        """The handler.

        Raises:
            KeyboardInterrupt: the command ends.
        """
        self.heard = time.monotonic()
        self.count += 1
        if self.count > self.tolerated:
            self.leaving = True
            if self.tolerated:
                self._later(_UNWIND, self._leave_unended)
            raise KeyboardInterrupt
        self._tell()

    def _tell(self) -> None:
        """Print the answer, once: here, or in the thread that hears a signal before the handler is called."""
        answer, self.answer = self.answer, ""
        if answer:
            with suppress(OSError):  # a terminal that is closed
                print(answer, file=sys.stderr, flush=True)

    def ask_at_a_prompt(self, number: int, frame: object) -> None:
        """The handler while a person types: raises KeyboardInterrupt; SIGINT alone need not be the end."""
        self.heard = time.monotonic()
        self.leaving |= number != signal.SIGINT
        raise KeyboardInterrupt

    def watch(self, received: int, numbers: list[int]) -> None:
        """End the process where no handler can: its main thread is in C++."""
        while data := os.read(received, 16):
            if times := sum(byte in numbers for byte in data):
                self.pressed += [time.monotonic()] * times
                self._tell()
                self._later(_PATIENCE, self._leave_unheard)
                self._later(_NUDGE, self._nudge)
        os.close(received)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        timer.start()

    def _nudge(self, times: int = 5) -> None:
        """Wake readline, which waits for a key where a signal came just before it began to wait.

        A few times at most: the handler may have been called just before this thread saw the signal.
        """
        if self.at_a_prompt and self.pressed[-1] > self.heard and times:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
            self._later(_NUDGE, lambda: self._nudge(times - 1))

    def _leave_unheard(self) -> None:
        unheard = sum(pressed > self.heard + _SLACK for pressed in self.pressed)
        if unheard > max(0, self.tolerated - self.count):
            self._leave()

    def _leave_unended(self) -> None:
        """Leave what Ctrl-C was tolerated in: C++ that calls Python may have swallowed the exception."""
        if self.tolerated:
            self._leave()

    def _leave(self) -> None:
        if self.last_call.acquire(blocking=False):
            leave()


_command: _Interrupts | None = None


def _forget_in_child() -> None:
    """Give a forked process Python's own handlers: its signals would be told to the parent's thread."""
    if _command is not None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if getattr(signal.getsignal(number), "__self__", None) is _command:
                own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, own)


os.register_at_fork(after_in_child=_forget_in_child)  # does nothing but in a command


def leave(sentence: str = "interrupted") -> NoReturn:
    """End the process at once; its temporary folders go, and nothing else is tidied up."""
    with suppress(Exception):  # a terminal that is gone
        print(sentence, file=sys.stderr, flush=True)
        sys.stdout.flush()
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(STATUS)


def half_imported(library: str = "mindspore") -> bool:
    """Whether an import of ``library`` was broken off: its parts are there, and it is not."""
    return library not in sys.modules and any(name.startswith(f"{library}.") for name in sys.modules)


def interrupted() -> bool:
    """Whether Ctrl-C ends the command, though another error may tell of it."""
    return _command is not None and _command.leaving


@contextmanager
def listening() -> Iterator[None]:
    """Handle Ctrl-C while a command runs in the main thread; elsewhere nothing is done."""
    global _command
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _command = _Interrupts()
    atexit.register(_skip_the_rest, _command)  # registered first, called last
    numbers: list[int] = [signal.SIGINT]
    if "MS_ROLE" not in os.environ:  # msrun ends its workers by SIGTERM
        numbers += [signal.SIGTERM, signal.SIGHUP]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup, or `&`
    _command.handled = numbers
    before = {number: signal.signal(number, _command.ask) for number in numbers}
    ends = os.pipe()
    os.set_blocking(ends[1], False)
    wakeup = signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
    threading.Thread(target=_command.watch, args=(ends[0], numbers), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(ends[1])
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _skip_the_rest(command: _Interrupts) -> None:
    """End here what was interrupted: what Python still does would crash in a library half imported."""
    if command.leaving and os.getpid() == command.process:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(STATUS)


@contextmanager
def tolerating(times: float, answer: str = "") -> Iterator[Callable[[], int]]:
    """Let Ctrl-C be pressed so often before it ends the command; yields how often it was, since this began.

    ``answer``: what is printed when it is pressed first.

    Raises:
        KeyboardInterrupt: it was pressed once more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # signals are the main thread's affair
        return
    command = _command or _Interrupts()
    command.count, command.tolerated, command.answer = 0, times, answer
    with _handling(command.ask):
        try:
            yield lambda: command.count
        finally:
            command.count, command.tolerated, command.answer = 0, 0, ""


@contextmanager
def prompting() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt without ending the command, while a person types."""
    command = _command or _Interrupts()
    command.tolerated = math.inf
    before = signal.signal(signal.SIGURG, lambda *_: None)  # wakes, and says nothing
    with _handling(command.ask_at_a_prompt, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        command.at_a_prompt = True
        try:
            yield
        finally:
            command.at_a_prompt = False
            command.tolerated = 0
            signal.signal(signal.SIGURG, before)


@contextmanager
def _handling(
    handler: Callable[[int, object], None], numbers: Sequence[int] = (signal.SIGINT,)
) -> Iterator[None]:
    """Handle by ``handler`` those of ``numbers`` that are not ignored; MindSpore may have taken SIGINT."""
    own = _command.handled if _command else [signal.SIGINT]
    before = {number: signal.signal(number, handler) for number in numbers if number in own}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.default_int_handler)  # None: MindSpore's


def listen_again() -> None:
    """Take SIGINT back from MindSpore's data set, whose handler ends the process."""
    if _command is not None and signal.SIGINT in _command.handled:
        signal.signal(signal.SIGINT, _command.ask)


def temporary_folder(prefix: str) -> str:
    """A new folder that is removed when this process ends, by Ctrl-C too."""
    folder = tempfile.mkdtemp(prefix=prefix)
    _folders.append(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
