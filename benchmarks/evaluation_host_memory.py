"""What an evaluation step of one long record takes on the host, beside what it takes on the device.

    python benchmarks/evaluation_host_memory.py --seq_length 8192 --vocab_size 16384

On a CPU the device's memory is the host's, so the two are separated in three ways. The step is run twice:
MindSpore keeps the device memory of the first, so that what the second adds to the resident memory is the
host's. Python's and NumPy's allocations are traced. The bytes that tensors hand over to NumPy are counted.
"""

import argparse
import os
import time
import tracemalloc
from threading import Event, Thread

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Model

from research.telechat2.run.perplexity import TelechatPerplexity
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq_length", type=int, default=8192, help="tokens of the record")
    parser.add_argument("--vocab_size", type=int, default=16384, help="of the random model")
    arguments = parser.parse_args()
    for name, value in measure(arguments.seq_length, arguments.vocab_size).items():
        print(f"{name:40} {value:15,} bytes")


def measure(seq_length: int, vocab_size: int) -> dict[str, int]:
    """Bytes of a step: on the device, and of the host above idle, in the three ways."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", jit_config={"jit_level": "O0"})
    network = TelechatForCausalLM(
        TelechatConfig(
            hidden_size=16,
            num_layers=1,
            num_heads=1,
            n_kv_heads=1,
            intermediate_size=32,
            seq_length=seq_length,
            vocab_size=vocab_size,
            compute_dtype="float32",
            param_init_type="float32",
        )
    ).set_train(False)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, vocab_size, (1, seq_length + 1)).astype(np.int32)
    data = NumpySlicesDataset({"input_ids": ids, "labels": ids}, shuffle=False).batch(1)
    model = Model(network, metrics={"TelechatPerplexity": TelechatPerplexity()}, eval_network=network)
    before = resident()
    first = peak_above(before, lambda: model.eval(data))
    idle = resident()
    above_idle = peak_above(idle, lambda: model.eval(data))
    handed_over = bytes_handed_over(lambda: model.eval(data))
    tracemalloc.start()
    model.eval(data)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "logits of the step, on the device": 4 * seq_length * vocab_size,
        "first step: device and host, peak": first,
        "host above idle, peak resident": above_idle,
        "host, peak of Python's and NumPy's": traced,
        "handed over from the device": handed_over,
    }


def resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE


def peak_above(base: int, action) -> int:
    """The most that is resident above ``base`` during ``action``, looked up every 2 ms."""
    highest, ended = [base], Event()

    def watch():
        while not ended.is_set():
            highest[0] = max(highest[0], resident())
            time.sleep(0.002)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        ended.set()
        watcher.join()
    return highest[0] - base


def bytes_handed_over(action) -> int:
    """Bytes of the arrays that tensors give to NumPy during ``action``."""
    handed, original = [0], Tensor.asnumpy

    def counting(tensor):
        array = original(tensor)
        handed[0] += array.nbytes
        return array

    Tensor.asnumpy = counting
    try:
        action()
    finally:
        Tensor.asnumpy = original
    return handed[0]


if __name__ == "__main__":
    main()
