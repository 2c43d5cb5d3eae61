"""Element types of weights, and casts between them on raw blocks of bytes.

NumPy has no bfloat16: here it is its bit pattern, uint16, the upper half of a float32.
"""

import numpy as np

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes per element


def cast(block: memoryview | bytes, source: str, target: str, name: str) -> memoryview:
    """The elements of ``block``, stored as ``source``, as the bytes of ``target``; round to nearest even.

    Infinities and NaN stay what they are.

    Raises:
        ValueError: a finite value of tensor ``name`` is beyond the range of ``target``.
    """
    if source == target:
        return memoryview(block)
    values = widen(block, source)
    result = _to_bfloat16(values) if target == "bfloat16" else _to_numpy(values, target)
    overflow = np.isfinite(values) & ~np.isfinite(widen(result, target))
    if overflow.any():
        raise ValueError(
            f"{name} holds {float(values[overflow][0])!r}, which {target} cannot hold "
            f"(largest {65504 if target == 'float16' else 3.39e38}); keep the dtype, or ask for "
            + ("bfloat16" if target == "float16" else "float32")
        )
    return memoryview(result).cast("B")


def widen(block: memoryview | bytes | np.ndarray, source: str) -> np.ndarray:
    """The elements of a block as float32, one-dimensional: exact for every type of weights."""
    if source != "bfloat16":
        return np.frombuffer(block, source).astype(np.float32, copy=False)
    return (np.frombuffer(block, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_numpy(values: np.ndarray, target: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # told apart from infinities that were there by the caller
        return values.astype(target)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40  # rounding could carry a NaN's bits over into an infinity or a zero
    return np.where(np.isnan(values), quiet_nan, nearest_even).astype(np.uint16)
