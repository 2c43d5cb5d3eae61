"""The lines of a training: how far it is, its loss and learning rate, time for a step, time left."""

import math
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from research.telechat2.run.screen import bars

SECONDS = 10  # between two lines, where the screen is no terminal


class Progress:
    """A bar on a terminal; elsewhere one line every ``SECONDS``, and those of the first and the last step."""

    def __init__(self, first: int, total: int, clock: Callable[[], float] = time.monotonic):
        """Begin before step ``first`` of ``total``."""
        self.total, self.clock, self.begun = total, clock, clock()
        self.start: tuple[float, int] | None = None  # when the first step had ended, and which it was
        self.shown = self.begun, first - 1  # the last line printed, likewise
        self.bar = _bar(first - 1, total) if sys.stdout.isatty() else None

    def show(self, step: int, loss: float | None, rate: float | None, due: bool = True) -> None:
        """Show that ``step`` has ended.

        ``loss``: None where another process has it. ``due``: by the YAML's ``per_print_times``.
        """
        now = self.clock()
        if self.start is None:
            self.start = now, step
            print(f"first step: {now - self.begun:.0f} s, with the compilation of the graph", flush=True)
            self._write(step, loss, rate, None)
        elif self.bar:
            self._write(step, loss, rate, (now - self.start[0]) / (step - self.start[1]))
        elif step >= self.total or (due and now - self.shown[0] >= SECONDS):
            self._write(step, loss, rate, (now - self.shown[0]) / (step - self.shown[1]))

    def _write(self, step: int, loss: float | None, rate: float | None, seconds: float | None) -> None:
        self.shown = self.clock(), step
        words = [f"loss {loss:.4f}" if loss is not None else "loss: known to the last stage"]
        if rate is not None:
            words.append(f"lr {rate:.3e}")
        if seconds is not None:
            left = timedelta(seconds=math.ceil(seconds * max(0, self.total - step)))
            words += [f"{seconds:.2f} s/step", f"{left} left"]
        if self.bar:
            self.bar.set_postfix_str("  ".join(words), refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            print(f"step {step}/{self.total}  " + "  ".join(words), flush=True)

    def close(self) -> None:
        """Leave the bar as it is; lines go below it from now on."""
        if self.bar:
            bars.remove(self.bar)
            self.bar.close()
            self.bar = None


def _bar(done: int, total: int):
    from tqdm import tqdm

    bar = tqdm(
        total=total, initial=done, desc="step", mininterval=0.5,
        ncols=shutil.get_terminal_size().columns - 1,
        file=getattr(sys.stdout, "screen", sys.stdout),
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}",
    )  # fmt: skip
    bars.append(bar)
    return bar
