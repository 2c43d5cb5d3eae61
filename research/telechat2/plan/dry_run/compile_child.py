"""The process in which simulate.py compiles: ``request.json`` in its folder becomes ``result.json``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[4])  # run as a file: the checkout is the import root

import gc  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from typing import Any  # noqa: E402

from research.telechat2.common.files import atomic_write  # noqa: E402


def main() -> None:
    """Compile what the request asks for; the result is MindSpore's layouts, or the text of what it raised."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    sys.path += [path for path in request["import_path"] if path not in sys.path]
    try:
        result = _compile(folder, request)
    except Exception as error:  # noqa: BLE001 whatever it is, the parent tells the user
        traceback.print_exc()
        result = {"error": str(error) or repr(error)}
    with atomic_write(folder / "result.json") as path:
        path.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # MindSpore's own end would ask CANN to release devices, which stand-ins do not have


def _compile(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    import mindspore as ms

    _keep_parameters_empty()
    ms.set_context(
        mode=ms.GRAPH_MODE, device_target="Ascend", save_graphs=1, save_graphs_path=str(folder / "ir")
    )
    ms.communication.init()
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        device_num=request["device_num"],
        global_rank=request["rank"],
        strategy_ckpt_config={"save_file": str(folder / "strategy.ckpt")},
        **request["parallel"],
    )
    module, _, function = request["target"].partition(":")
    start = time.perf_counter()
    cell, inputs = getattr(importlib.import_module(module), function)(**request["arguments"])
    built = time.perf_counter()
    gc.disable()  # it would look through the model again and again: a tenth of the time
    cell.compile(*inputs)
    compiled = time.perf_counter()
    return {
        "layouts": {name: list(layout) for name, layout in cell.parameter_layout_dict.items()},
        "seconds": {
            "build": built - start,
            "compile": compiled - built,
            "processor": time.process_time(),
        },
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _keep_parameters_empty() -> None:
    """Have MindSpore leave out the random numbers with which it fills every slice at a compilation's end.

    The shapes stay those of the whole parameters in Python, which nobody asks for afterwards; the layouts
    have both.
    """
    from mindspore.parallel import _utils

    _utils._slice_parameter = lambda parameter, phase, layout: None
    _utils._init_optimizer_state = lambda parameter, phase: None


if __name__ == "__main__":
    main()
