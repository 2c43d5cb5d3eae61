"""An answer of a model, and the streamer that receives its tokens."""

import time
from dataclasses import dataclass

STOPPED = "Ctrl-C"


class Stopped(Exception):  # noqa: N818 (nothing has gone wrong)
    """A person has stopped an answer."""


@dataclass
class Answer:
    """An answer: ``text`` without special tokens, ``ids`` with them, and how long its batch took.

    ``cut``: what ended the answer before the model did, a limit of length or STOPPED; "" if nothing. ``text``
    then ends before a character that is not complete.
    """

    text: str
    ids: list[int]
    cut: str
    seconds: float
    seconds_to_first_token: float

    def __str__(self) -> str:
        """A line of figures for a person."""
        first = self.seconds_to_first_token
        cut = f", cut off there by {self.cut}" if self.cut else ""
        later = speed(len(self.ids) - 1, self.seconds - first)
        return f"[{len(self.ids)} tokens{cut}, the first after {first:.2f} s{later}]"


def speed(tokens: int, seconds: float) -> str:
    """Tokens per second, to print after other figures; "" without tokens."""
    return f", {tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else ""


class Clock:
    """A streamer of ``generate`` that notes when tokens arrive: first the prompts are put, then each step.

    Each token of a single prompt goes to ``on_token``; Stopped is raised once ``stop()`` is true.
    """

    def __init__(self, on_token=None, stop=None):
        self.on_token, self.stop = on_token, stop
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value):
        """Take the prompts, or one step's tokens."""
        self.times.append(time.perf_counter())
        if len(self.times) > 1 and not isinstance(value, list):
            self.tokens.append(int(value))
            if self.on_token is not None:
                self.on_token(value)
        if self.stop is not None and self.stop():
            raise Stopped

    def end(self):
        """Nothing is held back."""

    def total(self) -> float:
        """Seconds from the prompts to the last token."""
        return self.times[-1] - self.times[0]

    def first(self) -> float:
        """Seconds from the prompts to the first token, to the end if there is none."""
        return self.times[min(1, len(self.times) - 1)] - self.times[0]
