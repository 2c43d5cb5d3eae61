"""Draw an estimate: the memory of each stage, and when each stage computes what."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from research.telechat2.common.files import atomic_write
from research.telechat2.plan.estimate.estimate import GB, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "gathered": "weights in the compute dtype",
    "activations": "activations kept for the backward pass",
    "working": "a recomputed layer, or the loss",
}
NUMBERED = 300  # passes of which each is labelled with its micro-batch
ROOM = 1.15  # of the axis above the highest bar and the limit, for their labels


def draw(estimate: Estimate, path: Path) -> None:
    """Write a PNG of memory, with a line at its limit, and of the schedule."""
    with atomic_write(path) as temporary:
        figure_of(estimate).savefig(temporary, format="png", dpi=120)


def figure_of(estimate: Estimate) -> "Figure":
    """The picture as matplotlib's figure: memory above, schedule below."""
    from matplotlib.figure import Figure  # here: only who draws waits for it

    stages = len(estimate.memory)
    figure = Figure(figsize=(13, 4.5 + 0.35 * stages), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(4, 0.5 + 0.35 * stages))
    _draw_memory(above, estimate)
    _draw_schedule(below, estimate)
    return figure


def _draw_memory(axes: "Axes", estimate: Estimate) -> None:
    stages, limit_gb = range(len(estimate.memory)), estimate.limit_gb
    floor = [0.0] * len(stages)
    for name in asdict(estimate.memory[0]):
        heights = [getattr(memory, name) / GB for memory in estimate.memory]
        axes.bar(stages, heights, 0.6, bottom=floor, label=WHAT[name])
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    top = max(*floor, limit_gb or 0) * ROOM
    axes.set_ylim(0, top)
    for stage, total in enumerate(floor):
        # Beside the line of the limit a label is put above it.
        near = limit_gb and total < limit_gb < total + 0.06 * top
        axes.annotate(
            f"{total:.1f}", (stage, limit_gb if near else total), (0, 2), textcoords="offset points",
            ha="center", va="bottom", color="#b00020" if limit_gb and total > limit_gb else "black",
        )  # fmt: skip
    peak = estimate.peak_bytes / GB
    title = f"Memory: {peak:.1f} GB on the fullest NPU"
    if limit_gb:
        axes.axhline(limit_gb, color="black", linestyle="--", label=f"limit: {limit_gb:g} GB")
        title += f", {'fits' if peak <= limit_gb else 'DOES NOT FIT'} into {limit_gb:g} GB"
    axes.set(xticks=list(stages), xlabel="stage of the pipeline", ylabel="GB on each NPU")
    axes.set_title(title, pad=10)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_schedule(axes: "Axes", estimate: Estimate) -> None:
    from matplotlib.patches import Patch

    schedule = estimate.throughput.schedule
    for step in schedule.passes:
        shade = step.chunk % len(SHADES[True])
        axes.barh(
            step.stage, step.end - step.start, left=step.start, height=0.8, color=SHADES[step.forward][shade],
            edgecolor="white", linewidth=0.3,
        )  # fmt: skip
        if len(schedule.passes) <= NUMBERED:
            axes.text(
                (step.start + step.end) / 2, step.stage, str(step.micro_batch), ha="center", va="center",
                color="white" if shade < DARK else "black", fontsize=6,
            )  # fmt: skip
    axes.invert_yaxis()
    stages = list(range(len(estimate.memory)))
    axes.set(yticks=stages, xlim=(0, schedule.seconds), xlabel="seconds", ylabel="stage")
    axes.set_title(f"Micro-batches of one step: stages idle {schedule.bubble:.1%} of the time", pad=10)
    chunks = estimate.workload.chunks
    handles = [
        Patch(
            color=shade,
            label=("forward" if forward else "backward") + (f", chunk {chunk}" if chunks > 1 else ""),
        )
        for forward, shades in SHADES.items()
        for chunk, shade in enumerate(shades[:chunks])
    ]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
