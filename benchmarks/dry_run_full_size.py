"""What the dry run of each shipped fine-tuning YAML takes, at full size and for all its devices.

    python benchmarks/dry_run_full_size.py [--config finetune_telechat_7b.yaml …] [--stages first]

Each compiles the training step of the first rank of the pipeline's first, middle and last stage, one after
the other, by telechat_plan.py as a user runs it. Printed are wall seconds, processor seconds and the peak of
resident memory, each of all processes together. The aim is a third of what the existing implementation takes
for rank 0 on two cores, random initialisation left out (97, 545, 457 and 151 s), and 4 GB.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file from anywhere

from research.telechat2.config.check import check  # noqa: E402
from research.telechat2.config.preflight import read_settings  # noqa: E402
from research.telechat2.config.yaml_files import read_config, shipped_configs  # noqa: E402

COMMAND = Path(__file__).resolve().parents[1] / "research" / "telechat2" / "telechat_plan.py"
STAGES = ("first", "middle", "last")
AIMS = {
    "finetune_telechat_7b.yaml": 32, "finetune_telechat_35b.yaml": 182, "finetune_telechat_115b.yaml": 152,
    "finetune_telechat_39b_a12b.yaml": 50,
}  # fmt: skip
PAGE = os.sysconf("SC_PAGE_SIZE")


def cluster_configs() -> list[str]:
    """The shipped YAMLs of clusters, by name."""
    found = [path for path in shipped_configs() if read_config(path).get("use_parallel")]
    return sorted({path.name for path in found})


def stages_of(name: str, places: list[str]) -> dict[int, int]:
    """The asked stages of a config's pipeline, each with its first rank; a stage stands for one place."""
    checked = check(read_settings(name, {}, Path.cwd())[1])
    last = len(checked.stages) - 1
    numbers = {"first": 0, "middle": (last + 1) // 2, "last": last}
    return {numbers[place]: checked.stages[numbers[place]].ranks[0] for place in places}


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; those that end meanwhile count nothing."""
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return total + sum(tree_bytes(int(child)) for child in children)


def measure(command: list[str], folder: str) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak GB of a command and its descendants.

    Raises:
        ValueError: the command failed.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise ValueError(f"{' '.join(map(str, command))} failed: {process.stderr.read().strip()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used, peak / 1e9


def main() -> None:
    """Print a row for each config and stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", nargs="+", default=cluster_configs(), help="shipped YAMLs; all by default"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    arguments = parser.parse_args()
    print(f"{'config':38} {'stage':>5} {'rank':>5} {'seconds':>8} {'processor':>9} {'peak GB':>8} {'aim':>5}")
    for name in arguments.config:
        for stage, rank in stages_of(name, arguments.stages).items():
            command = [sys.executable, COMMAND, "--config", name, "--dry_run", "--rank", str(rank)]
            with tempfile.TemporaryDirectory() as folder:
                wall, used, peak = measure(command, folder)
            aim = AIMS.get(Path(name).name, "-")
            print(f"{name:38} {stage:5} {rank:5} {wall:8.0f} {used:9.0f} {peak:8.2f} {aim:>5}", flush=True)


if __name__ == "__main__":
    main()
