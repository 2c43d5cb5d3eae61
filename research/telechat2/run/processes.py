"""The processes of a run: which of them this is, and whether they are those that the settings ask for."""

import os
import re
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.config.sections import section_of

LAUNCHER = 'bash scripts/msrun_launcher.sh "python run_mindformer.py …" N'
_DATA_PARALLEL = (0, "data_parallel", "DATA_PARALLEL")
# What launchers set: msrun, mpirun, a rank table; and a simulation, which needs none.
LAUNCHED_BY = ("MS_ROLE", "OMPI_COMM_WORLD_SIZE", "RANK_TABLE_FILE", "MS_SIMULATION_LEVEL")


def is_first_process() -> bool:
    """Whether this process speaks, locks and writes for all: rank 0, or the only one; never the scheduler."""
    return os.environ.get("MS_ROLE") != "MS_SCHED" and os.environ.get("RANK_ID", "0") == "0"


def device_num() -> int:
    """Processes of a parallel run, as msrun and other launchers tell them."""
    for name in ("MS_WORKER_NUM", "RANK_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def is_data_parallel(config: dict) -> bool:
    """Whether ranks are copies of each other: MindSpore's parallel_mode 0."""
    mode = (config.get("parallel") or {}).get("parallel_mode", 1)
    return bool(config.get("use_parallel")) and mode in _DATA_PARALLEL


def on_cpu(config: dict) -> bool:
    """Whether the settings ask for CPUs; Ascend is the default."""
    return section_of(config, "context").get("device_target") == "CPU"


def check_cpu_plan(config: dict) -> None:
    """UsageError for a ``use_parallel`` on CPUs that is other than data parallelism."""
    if config.get("use_parallel") and on_cpu(config) and not is_data_parallel(config):
        raise UsageError(
            "use_parallel on CPUs is data parallelism only; give --parallel.parallel_mode 0 "
            "--parallel.full_batch False, or --use_parallel False."
        )


def check_processes(config: dict) -> None:
    """UsageError for ``use_parallel`` without a launcher, or several processes without ``use_parallel``."""
    several = int(os.environ.get("MS_WORKER_NUM", "1")) if "MS_ROLE" in os.environ else 1
    if several > 1 and not config.get("use_parallel"):
        raise UsageError(
            f"use_parallel is False, which is for 1 process, not {several}; give --use_parallel True, "
            "or start the command without the launcher."
        )
    if config.get("use_parallel") and not any(os.environ.get(name) for name in LAUNCHED_BY):
        raise UsageError(
            f"use_parallel is True, but this is a single process; start several with {LAUNCHER}, "
            "or give --use_parallel False."
        )


def check_npus(config: dict, devices: Path = Path("/dev")) -> None:
    """UsageError for more processes than NPUs, or a ``device_id`` beyond them, where they can be counted."""
    context = section_of(config, "context")
    if context.get("device_target", "Ascend") != "Ascend" or os.environ.get("MS_SIMULATION_LEVEL"):
        return
    if visible := os.environ.get("ASCEND_RT_VISIBLE_DEVICES", ""):
        count, named = len(visible.split(",")), f"ASCEND_RT_VISIBLE_DEVICES={visible} leaves"
    else:
        count = sum(bool(re.fullmatch(r"davinci\d+", path.name)) for path in devices.glob("davinci*"))
        named = "this machine has"
    if not count:
        return  # MindSpore names what is missing
    launched = "MS_ROLE" in os.environ
    workers = int(os.environ.get("TELECHAT_LOCAL_WORKERS", "0")) if launched else 0
    if workers > count:
        raise UsageError(f"{workers} workers are started, but {named} {count} NPUs; start at most {count}.")
    device = context.get("device_id") or 0
    if not launched and isinstance(device, int) and device >= count:
        raise UsageError(f"context.device_id is {device}, but {named} {count} NPUs; give --device_id.")
