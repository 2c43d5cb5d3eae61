"""A person at a terminal: what they type becomes questions and commands, and Ctrl-C stops an answer.

Lines are read by readline, which has no limit of length; the terminal itself cuts a line at 4,095 bytes,
without a word. So while the model answers, the terminal keeps what is typed and pasted for readline.
"""

import codecs
import json
import locale
import os
import re
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import cycle
from pathlib import Path

from research.telechat2.common.interrupts import interrupted, prompting, tolerating
from research.telechat2.text.messages import is_blank

HELP = """\
/new     begin another conversation (also /clear, /reset)
/help    show this (also help)
/exit    leave (also /quit, /bye, exit, quit, and Ctrl-D)
Ctrl-C   stop the answer; the conversation goes on with what is shown. Once more: leave
A line that ends in \\ goes on in the next one. \"\"\" begins and ends a question of several lines."""
# What people type for each command, in lower case and half-width letters.
_WORDS = {
    "/new": ("/new", "/clear", "/reset"),
    "/help": ("/help", "/?", "/h", "help"),
    "/exit": ("/exit", "/quit", "/bye", "/q", "exit", "quit", "exit()", "quit()", ":q", "退出"),
}
COMMANDS = {word: command for command, words in _WORDS.items() for word in words}
_LIKE_A_COMMAND = re.compile(r"/[a-z?]+")
_BLOCK = '"""'
_MOST_OF_A_LINE = 4095  # bytes that a terminal without readline holds of one line
_MOST_HISTORY = 1000


class Terminal:
    """Standard input of a person; ``history``: the file that keeps questions for the next time."""

    def __init__(self, history: Path | None = None):
        self.stopped = False  # whether Ctrl-C was pressed since the last line
        self._history = history
        on_screen = os.isatty(1) or os.isatty(2)  # as input() asks before it uses readline
        self._readline = _load_readline() if on_screen else None
        for line in _read_history(history) if self._readline else ():
            self._readline.add_history(line)

    def lines(self) -> Iterator[str]:
        """Questions, and the commands /new, /help and /exit; the end of input, and /exit, end them.

        KeyboardInterrupt is raised for Ctrl-C twice, without a line between.
        """
        while True:
            try:
                with prompting():
                    text = self._question()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                if self.stopped or interrupted():
                    raise
                self.stopped = True
                note("\n(Ctrl-C once more leaves, and so does /exit)")
                continue
            self.stopped = False
            word = unicodedata.normalize("NFKC", text).lower()
            command = COMMANDS.get(word.strip())
            if command is None and _LIKE_A_COMMAND.fullmatch(word):
                note(f"({word} is no command; /help lists them. To ask it, type a blank before it.)")
                continue
            if command is None and not is_blank(text):
                self._remember(text)
            yield command or text
            if command == "/exit":
                return

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """While a question is answered: yields whether Ctrl-C was pressed; a second one interrupts."""
        with tolerating(1) as pressed:
            try:
                with _typing_kept() if self._readline else nullcontext():
                    yield lambda: pressed() > 0
            finally:
                self.stopped = pressed() > 0

    def _question(self) -> str:
        text = self._line("> ")
        if text.lstrip().startswith(_BLOCK):
            lines = [text.lstrip()[len(_BLOCK) :]]
            while not lines[-1].rstrip().endswith(_BLOCK):
                lines.append(self._further_line())
            lines[-1] = lines[-1].rstrip()[: -len(_BLOCK)]
            return "\n".join(lines).strip("\n")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._further_line()
        return text

    def _further_line(self) -> str:
        try:
            return self._line("... ")
        except EOFError:
            note("\n(not asked: its last line is missing)")
            raise

    def _line(self, prompt: str) -> str:
        while True:
            with _prompt_on_the_screen():
                text = input(prompt)
            if self._readline or len(text.encode("utf-8", "surrogateescape")) < _MOST_OF_A_LINE:
                return text
            note(
                f"(not asked: a terminal without readline holds {_MOST_OF_A_LINE:,} bytes of a line, and "
                "what was beyond is lost; ask it with --input_txt FILE)"
            )

    def _remember(self, text: str) -> None:
        if self._readline is None or self._history is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._history, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "a", encoding="utf-8") as file:
                file.write(json.dumps(text, ensure_ascii=False) + "\n")
        except (OSError, UnicodeEncodeError):  # an unwritable file, a question that is not UTF-8
            self._history = None


def history_file() -> Path | None:
    """Where questions are kept for the next time: the user's state folder; None without a home."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return Path(state) / "telechat2" / "history.jsonl"


def _read_history(path: Path | None) -> list[str]:
    """The last questions of a history file; of one that is not readable, none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
        found = [line for line in map(json.loads, lines) if isinstance(line, str)]
        if len(lines) > 2 * _MOST_HISTORY:
            kept = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found[-_MOST_HISTORY:])
            path.write_text(kept, encoding="utf-8")
        return found[-_MOST_HISTORY:]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return []


def _load_readline():
    """The module readline, which ``input`` uses once it is imported; None where Python has none."""
    try:
        import readline
    except ImportError:
        return None
    _let_readline_take_utf8()
    readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
    return readline


def _let_readline_take_utf8() -> None:
    """In the locale C readline refuses all but ASCII, with a beep, though Python reads UTF-8."""
    if codecs.lookup(sys.stdin.encoding or "ascii").name != "utf-8":
        return
    if codecs.lookup(locale.nl_langinfo(locale.CODESET) or "ascii").name == "utf-8":
        return
    with suppress(locale.Error):  # a system without that locale
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        os.environ["LC_ALL" if os.environ.get("LC_ALL") else "LC_CTYPE"] = "C.UTF-8"  # read at each line


class Spinner:
    """A turning sign on standard error while something takes time; nothing where that is no terminal."""

    def __init__(self):
        self._shown = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, label: str = "") -> None:
        """Turn, after half a second, with ``label`` behind the sign; without one also in mid-line."""
        if self._shown and self._thread is None:
            self._end.clear()
            self._thread = threading.Thread(target=self._turn, args=(label,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None

    def _turn(self, label: str) -> None:
        text = f" {label}" if label else ""
        back = f"\x1b[{len(text) + 1}D"
        pause = 0.5
        for sign in cycle("|/-\\"):
            if self._end.wait(pause):
                break
            print(f"{sign}{text}{back}", end="", file=sys.stderr, flush=True)
            pause = 0.1
        if pause == 0.1:
            print("\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _prompt_on_the_screen() -> Iterator[None]:
    """Make standard error standard output where that alone is a terminal: ``input`` then uses readline."""
    sys.stdout.flush()
    if os.isatty(1) or not os.isatty(2):
        yield
        return
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


@contextmanager
def _typing_kept() -> Iterator[None]:
    """Keep what is typed now for the next line, unseen and uncut; Ctrl-C still interrupts."""
    import termios

    try:
        before = termios.tcgetattr(0)
    except termios.error:  # standard input is no terminal after all
        yield
        return
    kept = list(before)
    kept[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(0, termios.TCSADRAIN, kept)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def note(text: object) -> None:
    """Tell a person something that is no answer."""
    print(text, file=sys.stderr, flush=True)
