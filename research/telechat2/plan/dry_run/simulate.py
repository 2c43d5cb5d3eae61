"""Compile a training graph for one rank of an Ascend cluster, in a process of its own, and read it.

    report = simulate("package.module:build", {"model_parallel": 4}, device_num=8, rank=0)
    report.parameters, report.collectives, report.operators

No NPU and no CANN are needed (see cann_stub.py), and nothing is executed: a legal plan gives a Report, an
illegal one the error with which MindSpore refuses it on the cluster.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.telechat2.common.errors import UsageError
from research.telechat2.plan.dry_run.cann_stub import ascend_environment
from research.telechat2.plan.dry_run.graph import Collective, Operator, ShardedParameter
from research.telechat2.plan.dry_run.read_ir import read_graph

TIME_LIMIT = 3600.0  # seconds that a compilation may take
STRATEGY = "strategy.ckpt"  # MindSpore's strategy file of the rank, in the folder of a compilation


class CompilationError(UsageError):
    """What was to be compiled is not legal, or could not be compiled; the message says why."""


@dataclass(frozen=True)
class Report:
    """What one rank of the cluster would hold, compute and communicate in one training step.

    Attributes:
        rank: of the simulated cluster.
        parameters, collectives, operators: see graph.py.
        seconds: how long building and compiling took, and all that the process used of its processors:
            ``{"build": …, "compile": …, "processor": …}``.
        peak_bytes: largest resident memory of the compiling process.
    """

    rank: int
    parameters: tuple[ShardedParameter, ...]
    collectives: tuple[Collective, ...]
    operators: tuple[Operator, ...]
    seconds: dict[str, float]
    peak_bytes: int


def simulate(
    target: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    device_num: int,
    rank: int = 0,
    parallel: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> Report:
    """Call ``target`` as rank ``rank`` of ``device_num`` NPUs, compile what it returns, report on that.

    The child process sets graph mode, the Ascend target and semi-automatic parallelism before that.

    Args:
        target: ``module:function``; importable here, so it is there. Called with ``arguments``, it returns
            ``(cell, inputs)``: the cell to compile, as a training step, and its inputs of the global batch.
        arguments: keyword arguments, of what JSON can hold.
        device_num, rank: the cluster and the place in it.
        parallel: what ``set_auto_parallel_context`` is given besides: ``pipeline_stages``,
            ``enable_parallel_optimizer``, ``parallel_optimizer_config``, ….
        folder: a new folder for the log, the IR and the strategy file. None: they are removed in the end, and
            left in a temporary folder named by the error if it failed.

    Raises:
        CompilationError: the plan is illegal, or the child crashed or took too long; names the log.
        UsageError: see ascend_environment.
    """
    environment = ascend_environment(device_num, rank)
    kept = folder is not None
    folder = Path(folder or tempfile.mkdtemp(prefix="telechat_dry_run_")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    request = {
        "target": target,
        "arguments": arguments or {},
        "parallel": {"full_batch": True, **(parallel or {})},
        "device_num": device_num,
        "rank": rank,
        "import_path": [path or os.getcwd() for path in sys.path],
    }
    (folder / "request.json").write_text(json.dumps(request, indent=1))
    result = _run_child(folder, environment)
    graph = read_graph(folder / "ir" / f"rank_{rank}", result["layouts"], rank)
    report = Report(rank, *graph, seconds=result["seconds"], peak_bytes=result["peak_bytes"])
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _run_child(folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What the child reports; its output goes to ``log.txt``."""
    log = folder / "log.txt"
    environment |= {
        "GLOG_v": "3",
        "GLOG_logtostderr": "1",
        "LOG_MF_PATH": str(folder / "mindformers"),
        "MS_OM_PATH": str(folder),
        # Only the last graph of the front end is written, which holds all communication. Writing each of the
        # eighty passes takes as long as they do.
        "MS_DEV_DUMP_IR_PASSES": "validate",
    }
    command = [sys.executable, str(Path(__file__).with_name("compile_child.py")), str(folder)]
    with open(log, "wb") as output:
        try:
            child = subprocess.run(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=TIME_LIMIT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CompilationError(
                f"the compilation took longer than {TIME_LIMIT:.0f} s and was ended. Its log is {log}."
            ) from None
    file = folder / "result.json"
    if not file.exists():
        raise CompilationError(
            f"the compiling process ended without a result ({_ending(child.returncode)}); the last lines of "
            f"its log, {log}, are: {_tail(log)}"
        )
    result: dict[str, Any] = json.loads(file.read_text())
    if "error" in result:
        raise CompilationError(f"{_explained(result['error'], log)} The log is {log}.")
    return result


def _ending(code: int) -> str:
    if code == -9:
        return "killed, perhaps for want of memory"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _tail(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").split("\n")[-6:]).strip()


def _explained(error: str, log: Path) -> str:
    """The first line of MindSpore's exception, and the first reason that its log gives for it.

    The exception only names the operator; what is wrong with its strategy is in the log alone.
    """
    lines = error.strip().splitlines()
    marker = "] "
    reasons = (
        line.rsplit(marker, 1)[1]
        for line in log.read_text(errors="replace").splitlines()
        if line.startswith("[ERROR] PARALLEL") and marker in line
    )
    where = (line.strip() for line in lines if line.startswith(("In file", "# In file")))
    found = [lines[0], next(reasons, None), next(where, None)]
    return " ".join(f"{text.rstrip('.')}." for text in found if text is not None)
