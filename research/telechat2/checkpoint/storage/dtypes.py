"""Casts between the element types of weights, and counts of NaN and infinities, on raw blocks of bytes.

NumPy has no bfloat16: here it is its bit pattern, uint16, the upper half of a float32.
"""

import numpy as np
from numpy.typing import NDArray

from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError

INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}  # bit patterns, without the sign
NOT_READ = "weights are read as float32, float16 and bfloat16; give those from before quantization"
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895314e38}


def cast(block: memoryview | bytes, source: str, target: str, name: str) -> memoryview:
    """The elements of ``block``, stored as ``source``, as the bytes of ``target``; round to nearest even.

    Infinities and NaN stay. UsageError if a finite value of tensor ``name`` is too large for ``target``.
    """
    if source == target:
        return memoryview(block)
    values = widen(block, source)
    if target == "float32":
        return values.data.cast("B")
    if target == "bfloat16":
        result = _to_bfloat16(values)
    else:
        with np.errstate(over="ignore"):  # told from infinities that were there before below
            result = values.astype(np.float16)
    infinite = (result.view(np.uint16) & 0x7FFF) == INFINITY[target]
    if infinite.any() and np.isfinite(values[infinite]).any():
        raise UsageError(
            f"{name} holds {float(np.abs(values[np.isfinite(values)]).max())!r}, but the largest number of "
            f"{target} is {LARGEST[target]:.6g}; keep the dtype, or choose another"
        )
    return result.data.cast("B")


def widen(block: memoryview | bytes | bytearray, source: str) -> NDArray[np.float32]:
    """The elements of a block as float32, one-dimensional: exact for every type of weights."""
    if source != "bfloat16":
        return np.frombuffer(block, source).astype(np.float32, copy=False)
    return (np.frombuffer(block, np.uint16).astype(np.uint32) << 16).view(np.float32)


def count_nonfinite(block: memoryview | bytes | bytearray, dtype: str) -> tuple[int, int]:
    """How many elements of a block are NaN, and how many infinite.

    Read as integers they are the largest of either sign: two maxima, which cost no memory, show that a block
    has none.
    """
    if not len(block):
        return 0, 0
    width, infinity = WIDTH[dtype], INFINITY[dtype]
    unsigned = np.frombuffer(block, f"<u{width}")
    sign = 1 << (8 * width - 1)
    if unsigned.view(f"<i{width}").max() < infinity and unsigned.max() < sign + infinity:
        return 0, 0
    magnitude = unsigned & (sign - 1)
    return int(np.count_nonzero(magnitude > infinity)), int(np.count_nonzero(magnitude == infinity))


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():  # rounding could carry a NaN's bits over into an infinity or a zero
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded
