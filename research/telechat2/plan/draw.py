"""Draw an estimate: the memory of each stage, and when each stage computes what."""

from dataclasses import asdict
from pathlib import Path

from research.telechat2.plan.estimate import Estimate
from research.telechat2.plan.schedule import Pass
from research.telechat2.telechat_files import atomic_write

# Forward blue, backward orange, a lighter shade for each further chunk.
SHADES = {
    True: ("#1f4e79", "#4a86c5", "#8fb8e3", "#c3daf2"),
    False: ("#b3541e", "#e08a3c", "#f2b679", "#f9dcbc"),
}
NUMBERED = 300  # passes of which each is labelled with its micro-batch
GB = 1e9


def draw(estimate: Estimate, path: str | Path, memory_gb: float | None = None) -> None:
    """Write a PNG of memory and schedule.

    Args:
        path: of the new file.
        memory_gb: a line at what an NPU has; None for none.

    Raises:
        ValueError: the file exists, or is not called ``.png``.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"{path} is to be a picture, which is written as PNG only; call it {path.stem}.png.")
    if path.exists():
        raise ValueError(f"{path} exists and is not overwritten; give another name.")
    from matplotlib.figure import Figure  # here: only who draws waits for it

    stages = len(estimate.memory)
    figure = Figure(figsize=(12, 4.5 + 0.35 * stages), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(4, 0.5 + 0.35 * stages))
    _draw_memory(above, estimate, memory_gb)
    _draw_schedule(below, estimate)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_memory(axes, estimate: Estimate, memory_gb: float | None) -> None:
    stages = range(len(estimate.memory))
    floor = [0.0] * len(stages)
    for name in asdict(estimate.memory[0]):
        heights = [getattr(memory, name) / GB for memory in estimate.memory]
        axes.bar(stages, heights, 0.6, bottom=floor, label=name)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    for stage, total in enumerate(floor):
        axes.annotate(f"{total:.1f}", (stage, total), ha="center", va="bottom")
    if memory_gb:
        axes.axhline(memory_gb, color="black", linestyle="--", label=f"{memory_gb:g} GB")
    axes.set(xticks=list(stages), xlabel="stage", ylabel="GB on each NPU", title="Memory")
    axes.margins(y=0.1)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_schedule(axes, estimate: Estimate) -> None:
    plan = estimate.throughput.schedule
    for step in plan.passes:
        colour = SHADES[step.forward][step.chunk % len(SHADES[True])]
        axes.barh(
            step.stage, step.end - step.start, left=step.start, height=0.8, color=colour, edgecolor="white",
            linewidth=0.3,
        )  # fmt: skip
        if len(plan.passes) <= NUMBERED:
            _label(axes, step)
    axes.invert_yaxis()
    axes.set(
        yticks=list(range(len(estimate.memory))), xlim=(0, plan.seconds), xlabel="seconds", ylabel="stage",
        title=f"Micro-batches forward (blue) and backward (orange): {plan.bubble:.1%} idle",
    )  # fmt: skip


def _label(axes, step: Pass) -> None:
    middle = (step.start + step.end) / 2
    axes.text(middle, step.stage, str(step.micro_batch), ha="center", va="center", color="white", fontsize=6)
