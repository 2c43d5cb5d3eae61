"""How much memory a conversion to MindSpore and back needs."""

import tracemalloc

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch


def peak_of_both_ways(folder) -> int:
    """Bytes that Python holds at most while ``folder/hf`` becomes ``folder/ms``, and that ``folder/back``."""
    tracemalloc.start()
    try:
        convert_to_mindspore(folder / "hf", folder / "ms")
        convert_to_torch(folder / "ms", folder / "back")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
