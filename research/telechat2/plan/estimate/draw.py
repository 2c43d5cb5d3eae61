"""Draw an estimate: the memory of each stage, and when each stage computes what."""

from dataclasses import asdict
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write
from research.telechat2.plan.estimate.estimate import Estimate
from research.telechat2.plan.estimate.schedule import Pass

# Forward blue, backward orange, a lighter shade for each further chunk of layers.
SHADES = {
    True: ("#1f4e79", "#4a86c5", "#8fb8e3", "#c3daf2"),
    False: ("#b3541e", "#e08a3c", "#f2b679", "#f9dcbc"),
}
DARK = 2  # shades on which a number is white
WHAT = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer (two moments)",
    "gathered": "weights as they are computed with",
    "activations": "activations kept for the backward pass",
    "working": "a layer computed again, or the loss",
}
NUMBERED = 300  # passes of which each is labelled with its micro-batch
ROOM = 1.15  # of the axis above the highest bar and the limit, for their labels
GB = 1e9


def draw(estimate: Estimate, path: str | Path, memory_gb: float | None = None) -> None:
    """Write a PNG of memory and schedule.

    Args:
        path: of the new file.
        memory_gb: a line at what an NPU has; None for none.

    Raises:
        UsageError: the file exists, or is not called ``.png``.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise UsageError(f"{path} is to be a picture, which is written as PNG only; call it {path.stem}.png.")
    if path.exists():
        raise UsageError(f"{path} exists and is not overwritten; give another name.")
    figure = figure_of(estimate, memory_gb)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def figure_of(estimate: Estimate, memory_gb: float | None = None):
    """The picture as matplotlib's figure: memory above, schedule below."""
    from matplotlib.figure import Figure  # here: only who draws waits for it

    stages = len(estimate.memory)
    figure = Figure(figsize=(13, 4.5 + 0.35 * stages), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(4, 0.5 + 0.35 * stages))
    _draw_memory(above, estimate, memory_gb)
    _draw_schedule(below, estimate)
    return figure


def _draw_memory(axes, estimate: Estimate, memory_gb: float | None) -> None:
    stages = range(len(estimate.memory))
    floor = [0.0] * len(stages)
    for name in asdict(estimate.memory[0]):
        heights = [getattr(memory, name) / GB for memory in estimate.memory]
        axes.bar(stages, heights, 0.6, bottom=floor, label=WHAT[name])
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    top = max(*floor, memory_gb or 0) * ROOM
    axes.set_ylim(0, top)
    for stage, total in enumerate(floor):
        # Beside the line of the limit a label is put above it.
        near = memory_gb and total < memory_gb < total + 0.06 * top
        axes.annotate(
            f"{total:.1f}", (stage, memory_gb if near else total), (0, 2), textcoords="offset points",
            ha="center", va="bottom", color="#b00020" if memory_gb and total > memory_gb else "black",
        )  # fmt: skip
    if memory_gb:
        axes.axhline(memory_gb, color="black", linestyle="--", label=f"limit: {memory_gb:g} GB")
    axes.set(xticks=list(stages), xlabel="stage of the pipeline", ylabel="GB on each NPU")
    axes.set_title(_memory_title(estimate, memory_gb), pad=10)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _memory_title(estimate: Estimate, memory_gb: float | None) -> str:
    peak = estimate.peak_bytes / GB
    if memory_gb is None:
        return f"Memory: {peak:.1f} GB on the fullest NPU"
    verdict = "fits" if peak <= memory_gb else "DOES NOT FIT"
    return f"Memory: {peak:.1f} GB on the fullest NPU, {verdict} into {memory_gb:g} GB"


def _draw_schedule(axes, estimate: Estimate) -> None:
    plan = estimate.throughput.schedule
    chunks = estimate.workload.chunks
    for step in plan.passes:
        axes.barh(
            step.stage, step.end - step.start, left=step.start, height=0.8, color=_shade(step),
            edgecolor="white", linewidth=0.3,
        )  # fmt: skip
        if len(plan.passes) <= NUMBERED:
            _label(axes, step)
    axes.invert_yaxis()
    axes.set(
        yticks=list(range(len(estimate.memory))), xlim=(0, plan.seconds), xlabel="seconds", ylabel="stage"
    )
    axes.set_title(f"Micro-batches of one step: stages idle {plan.bubble:.1%} of the time", pad=10)
    axes.legend(handles=_legend(chunks), loc="center left", bbox_to_anchor=(1, 0.5))


def _legend(chunks: int) -> list:
    """A patch for each shade: forward and backward passes of each chunk of layers."""
    from matplotlib.patches import Patch

    names = [f", chunk {chunk}" if chunks > 1 else "" for chunk in range(min(chunks, len(SHADES[True])))]
    return [
        Patch(color=SHADES[forward][chunk], label=("forward" if forward else "backward") + name)
        for forward in (True, False)
        for chunk, name in enumerate(names)
    ]


def _shade(step: Pass) -> str:
    return SHADES[step.forward][step.chunk % len(SHADES[True])]


def _label(axes, step: Pass) -> None:
    middle = (step.start + step.end) / 2
    colour = "white" if step.chunk % len(SHADES[True]) < DARK else "black"
    axes.text(middle, step.stage, str(step.micro_batch), ha="center", va="center", color=colour, fontsize=6)
