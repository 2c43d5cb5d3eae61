"""The training speeds that are published for TeleChat2, and the constants fitted to them.

Tokens a second and NPU, at a sequence length of 8192, on Atlas 800T A2 (MindFormers' TeleChat2 README of
v1.6.0), with the plans of the shipped YAMLs.
"""

from math import log
from pathlib import Path

from research.telechat2.config.preflight import read_settings
from research.telechat2.plan.estimate.costs import StepCosts, step_costs
from research.telechat2.plan.estimate.estimate import Efficiency, throughput
from research.telechat2.plan.estimate.workload import Workload, workload

SPEEDS = {"7b": 2950, "35b": 516, "115b": 158, "39b_a12b": 865}


def published_workloads() -> dict[str, Workload]:
    """The runs whose speeds are published."""
    folder = Path(__file__).resolve().parents[1] / "research" / "telechat2"
    runs = {}
    for size in SPEEDS:
        name = f"telechat2-{size.replace('_', '-')}/finetune_telechat_{size}.yaml"
        _, settings = read_settings(str(folder / name), {}, folder)
        runs[size] = workload(settings)
    return runs


def errors(runs: dict[str, Workload], efficiency: Efficiency) -> dict[str, float]:
    """Predicted by published speed, less one."""
    return {
        size: throughput(run, efficiency).tokens_per_second / SPEEDS[size] - 1 for size, run in runs.items()
    }


def fit(runs: dict[str, Workload]) -> Efficiency:
    """The two constants with the least squares of the errors' logarithms, to half a percent of 1.

    A grid around the best so far, finer and finer.
    """
    costs = {size: step_costs(run) for size, run in runs.items()}

    def loss(efficiency: Efficiency) -> float:
        return sum(
            log(_speed(run, efficiency, costs[size]) / SPEEDS[size]) ** 2 for size, run in runs.items()
        )

    best, width = Efficiency(0.5, 0.5), 0.4
    while width > 0.005:
        steps = [width * i / 3 for i in range(-3, 4)]
        around = [
            Efficiency(min(max(best.compute + a, 0.01), 1.0), min(max(best.links + b, 0.01), 1.0))
            for a in steps
            for b in steps
        ]
        best = min((best, *around), key=loss)
        width /= 2
    return best


def _speed(run: Workload, efficiency: Efficiency, costs: StepCosts) -> float:
    return throughput(run, efficiency, costs).tokens_per_second


def leave_one_out(runs: dict[str, Workload]) -> dict[str, float]:
    """Each point's error with constants fitted to the three others."""
    found = {}
    for size, run in runs.items():
        others = {other: runs[other] for other in runs if other != size}
        found |= errors({size: run}, fit(others))
    return found
