"""A person at a pseudo-terminal."""

import codecs
import os
import pty
import select
import subprocess
import time
from pathlib import Path

PROMPT = "> "


class Person:
    """Starts a command whose standard input and error (and output, unless told) are a terminal of its own.

    ``seen``: all that stood on the screen so far, control sequences included.
    """

    def __init__(self, command: list, cwd: Path, stdout=None, **environment: str):
        self.master, terminal = pty.openpty()
        clean = {key: value for key, value in os.environ.items() if key not in ("INPUTRC", "TERM")}
        environment = clean | {"TERM": "xterm", "XDG_STATE_HOME": str(cwd / "state")} | environment
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *map(str, command)], stdin=terminal, stdout=stdout or terminal,
            stderr=terminal, cwd=cwd, env=environment,
        )  # fmt: skip
        os.close(terminal)
        self.seen, self._looked = "", 0
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def types(self, text: str) -> None:
        """Put ``text`` into the terminal, as fast as it takes it, and read the screen meanwhile."""
        left = text.encode()
        while left:
            _, writable, _ = select.select([], [self.master], [], 0.05)
            if writable:
                left = left[os.write(self.master, left[:512]) :]
            self._read(0)

    def sees(self, text: str, seconds: float = 20) -> str:
        """Wait until ``text`` appears behind what was waited for before; what stood before it."""
        until = time.monotonic() + seconds
        while text not in self.seen[self._looked :]:
            assert time.monotonic() < until and self._read(0.1), (text, self.seen)
        at = self.seen.index(text, self._looked)
        before, self._looked = self.seen[self._looked : at], at + len(text)
        return before

    def asks(self, line: str, answer: str) -> None:
        """Type a line and wait for the answer, and for the next prompt."""
        self.types(f"{line}\r")
        self.sees(answer)
        self.sees(PROMPT)

    def leaves(self, seconds: float = 20) -> int:
        """Wait for the command's end; its exit status."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            self._read(0.1)
        while self._read(0):
            pass
        os.close(self.master)
        return self.process.wait(1)

    def _read(self, seconds: float) -> bool:
        """Take what is on the screen; False at its end, or where there is nothing in no time."""
        if not select.select([self.master], [], [], seconds)[0]:
            return seconds > 0
        try:
            found = os.read(self.master, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.seen += self._decode(found)
        return bool(found)
