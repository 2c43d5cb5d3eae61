"""A rank of a simulated cluster: compiles a step without initial values, then loads what it stores."""

import json
import os
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    """Write the layouts and slices of ``request.json``'s rank into the folder given."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    sys.path[:0] = request["import_path"]
    import mindspore as ms
    from mindspore.nn.utils import no_init_parameters
    from parallel_cells import build

    from research.telechat2.run.weights import load_network

    ms.set_context(mode=ms.GRAPH_MODE, device_target="Ascend")
    ms.communication.init()
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel", device_num=request["device_num"], global_rank=request["rank"],
        full_batch=True, **request["parallel"],
    )  # fmt: skip
    with no_init_parameters():
        step, inputs = build(request["config"])
    step.compile(*inputs)
    layouts = step.parameter_layout_dict
    load_network(Path(request["source"]), step.network, layouts)  # as the Trainer: without the optimizer
    weights = {parameter.name: parameter for parameter in step.network.get_parameters()}
    values = {
        name: p.asnumpy()
        for name, p in weights.items()
        if name in layouts and not name.endswith("expert_load")
    }
    np.savez(folder / "slices.npz", **values)
    groups = {name: layout[5] for name, layout in layouts.items() if layout[5]}
    result = {
        "layouts": {name: [layout[0], layout[1], layout[5]] for name, layout in layouts.items()},
        "groups": {
            group: [ms.communication.get_rank(group), ms.communication.get_group_size(group)]
            for group in set(groups.values())
        },
    }
    (folder / "result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # MindSpore's own end would ask CANN to release devices, which stand-ins do not have


if __name__ == "__main__":
    main()
