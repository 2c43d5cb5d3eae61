"""The steps of a training as a file and as a picture: ``metrics.jsonl`` and ``loss_curve.png``.

A line is one step: ``{"step", "loss", "learning_rate", "grad_norm", "seconds"}``; a number that is not finite
is a text ("nan", "inf"). A resumed run begins with the lines of the run it continues.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write

NAME = "metrics.jsonl"
POINTS = 4000  # a curve of more steps is drawn through the means of neighbours
DRAW_SECONDS = 60  # between two pictures, and at least 100 times what one takes


def find_metrics(checkpoint: str | Path) -> Path | None:
    """The ``metrics.jsonl`` of the run that saved ``checkpoint``, a file or folder; None: there is none."""
    path = Path(checkpoint).absolute()
    found = (folder / NAME for folder in (path, *path.parents[:3]))
    return next((file for file in found if file.is_file()), None)


def read_metrics(path: Path) -> list[dict]:
    """The steps of a file, in their order; a last line that was cut when the run was killed is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            steps.append(step | {"step": int(step["step"]), "loss": float(step["loss"])})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                found = f"{path}, line {number}: no step of a training ({line[:60]!r})"
                raise UsageError(f"{found}; remove the line, or move the file away.") from error
    return steps


class Metrics:
    """The steps of a run and of those before it, kept in its folder and drawn."""

    def __init__(self, folder: str | Path, after: int = 0, history: str | Path | None = None):
        """Begin after step ``after``; ``history`` is the file of the run that is continued."""
        self.folder = Path(folder)
        path = self.folder / NAME
        if history is None and after and path.is_file():
            history = path
        before = read_metrics(Path(history)) if after and history else []
        before = [step for step in before if step["step"] <= after]
        self.steps = [step["step"] for step in before]
        self.losses = [step["loss"] for step in before]
        self.picture = self.folder / "loss_curve.png"
        if after and not before:  # nothing is known of the first steps: leave a picture that shows them
            self.picture = self.folder / f"loss_curve_from_step_{after + 1}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.is_file() and (not history or path.resolve() != Path(history).resolve()):
            path.rename(_free(path))
        with atomic_write(path) as temporary:
            text = "".join(f"{json.dumps(_writable(step))}\n" for step in before)
            temporary.write_text(text, encoding="utf-8")
        self.path, self._failed = path, False
        self._thread, self._drawn, self._took = None, time.monotonic(), 0.0

    def add(self, step: int, loss: float, **more: float | None) -> None:
        """Keep one step; ``more`` are further numbers of it."""
        self.steps.append(step)
        self.losses.append(loss)
        with self._forgiven(), open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(_writable({'step': step, 'loss': loss} | more))}\n")

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        """Go on training when the file or the picture cannot be written, and print so once."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                print(f"warning: {self.folder}: steps or curve cannot be written: {error}", file=sys.stderr)
            self._failed = True

    def draw_now_and_then(self) -> None:
        """Draw in a thread of its own, if the last picture is old enough."""
        age = time.monotonic() - self._drawn
        if age < max(DRAW_SECONDS, 100 * self._took) or (self._thread and self._thread.is_alive()):
            return
        self._drawn = time.monotonic()
        self._thread = threading.Thread(target=self._draw, args=(len(self.steps),), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Draw all that is known; once more does no harm."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self.steps:
            self._draw(len(self.steps))

    def _draw(self, count: int) -> None:
        began = time.monotonic()
        with self._forgiven():
            draw_loss_curve(self.steps[:count], self.losses[:count], self.picture)
        self._took = time.monotonic() - began


def _free(path: Path) -> Path:
    """``metrics_1.jsonl``, or the first of that kind that does not exist."""
    paths = (path.with_stem(f"{path.stem}_{number}") for number in count(1))
    return next(found for found in paths if not found.exists())


def _writable(step: dict) -> dict:
    """The numbers as JSON has them; those that are not finite as text."""
    floats = {key: value for key, value in step.items() if isinstance(value, float)}
    return step | {key: str(value) for key, value in floats.items() if not math.isfinite(value)}


def draw_loss_curve(steps: list[int], losses: list[float], path: Path) -> None:
    """Write a PNG of loss over steps, the loss on a logarithmic axis."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    each = -(-len(steps) // POINTS)
    if each > 1:
        edges = np.arange(0, len(steps), each)
        counts = np.diff(np.append(edges, len(steps)))
        steps, losses = (np.add.reduceat(np.array(values, np.float64), edges) / counts
                         for values in (steps, losses))  # fmt: skip
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, linewidth=1)
    means = f", means of {each} steps" if each > 1 else ""
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title=f"TeleChat2 training{means}")
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
