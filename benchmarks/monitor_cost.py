"""What the TelechatMonitor costs a training step: as it is, beside drawing the curve after each step.

    python benchmarks/monitor_cost.py --steps 2000

With sink_size 1, as NPUs train, MindSpore ends an epoch after every step, where the curve was drawn.
Both are measured in one process, in turns, on a curve that grows to the same length.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file from anywhere

from research.telechat2.common.cli import quiet_libraries  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="of the training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of both measurements (default: %(default)s)")
    arguments = parser.parse_args()
    quiet_libraries()
    from mindspore import Tensor

    from research.telechat2.run import monitor as run_monitor
    from research.telechat2.run.metrics import draw_loss_curve

    with tempfile.TemporaryDirectory() as folder:
        run_monitor.output_directory = lambda: folder
        monitor = run_monitor.TelechatMonitor()
        network = SimpleNamespace(get_parameters=lambda: iter(()))
        outputs = Tensor(2.5), Tensor(False), Tensor(1.0), Tensor(1e-4), Tensor(0.5)
        params = SimpleNamespace(cur_step_num=0, net_outputs=outputs, train_network=network)
        context = SimpleNamespace(original_args=lambda: params)
        monitor.begin(context)
        each, drawn = [], []
        for part in range(arguments.rounds):
            for step in range(arguments.steps // arguments.rounds):
                params.cur_step_num = 1 + step + part * (arguments.steps // arguments.rounds)
                each.append(timed(lambda: monitor.step_end(context)))
            drawn.append(timed(lambda: draw_loss_curve(monitor.steps, monitor.losses, Path(folder, "c.png"))))
        print(f"a step of the monitor      {1e3 * median(each):9.3f} ms (longest {1e3 * max(each):.1f} ms)")
        print(f"drawing after each step    {1e3 * median(drawn):9.3f} ms more")
        print(f"ratio                      {median(drawn) / median(each):9.0f}")


def timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
