"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps.

Not by the library: bytes move in blocks, whatever a checkpoint's size, and errors say what is broken.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from research.telechat2.checkpoint.storage.dtypes import NOT_READ
from research.telechat2.checkpoint.storage.tensor import BLOCK_BYTES, Blocks, Shape, StoredTensor
from research.telechat2.common.errors import UsageError
from research.telechat2.common.placeholders import what_stands_here
from research.telechat2.common.tables import listed

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES_OF_WIDTH = {
    8: {"F64": "float64", "I64": "int64", "U64": "uint64", "C64": "complex64"},
    4: {"F32": "float32", "I32": "int32", "U32": "uint32"},
    2: {"F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16"},
    1: {"BOOL": "bool", "I8": "int8", "U8": "uint8"}
    | {code: code for code in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
}
DTYPES = {code: dtype for dtypes in _DTYPES_OF_WIDTH.values() for code, dtype in dtypes.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BYTES = {dtype: width for width, dtypes in _DTYPES_OF_WIDTH.items() for dtype in dtypes.values()}


def read_safetensors(file: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of their bytes; only the header is read.

    UsageError if it is not safetensors, or cut off.
    """
    with open(file, "rb") as stream:
        header = _read_header(file, stream)
        data_start, size = stream.tell(), os.fstat(stream.fileno()).st_size
    header.pop("__metadata__", None)
    entries = sorted((*_offsets(file, name, entry), name, entry) for name, entry in header.items())
    tensors, end = [], 0
    for begin, next_begin, name, entry in entries:
        code, shape = entry.get("dtype"), _shape(file, name, entry)
        if not isinstance(code, str) or code not in DTYPES:
            raise UsageError(f"{file}: tensor {name} is stored as {code!r}, but {NOT_READ}.")
        nbytes = prod(shape) * BYTES[DTYPES[code]]
        if begin != end or next_begin - begin != nbytes:
            here = f"tensor {name}, {code} {list(shape)}, is at bytes {begin} to {next_begin} of the data"
            raise _broken(file, f"{here}, expected {nbytes} bytes from byte {end}")
        end = next_begin
        extent = (file, data_start + begin, data_start + end)
        blocks = partial(_read_blocks, *extent)
        tensors.append(StoredTensor(name, DTYPES[code], shape, file, blocks, (extent,)))
    if data_start + end != size:
        raise _broken(file, f"its header describes {data_start + end} bytes, the file has {size} bytes")
    return tensors


def read_metadata(file: Path) -> dict[str, Any]:
    """What a file's header says beside its tensors, such as ``{"format": "ms"}``, if anything."""
    with open(file, "rb") as stream:
        metadata = _read_header(file, stream).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def header_bytes(tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> bytes:
    """The head of a file of ``tensors`` (name -> dtype, shape) in order; ``metadata`` has a ``format``."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def _read_header(file: Path, stream: BinaryIO) -> dict[str, Any]:
    """The parsed header; afterwards ``stream`` stands where the data begins."""
    size, start = os.fstat(stream.fileno()).st_size, stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise _broken(file, f"it begins with a header's length of {length}, the file has {size} bytes")
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise _broken(file, f"its header is not JSON ({error})") from None
    if repeated:
        raise _broken(file, f"its header has {len(repeated)} names twice: {listed(repeated)}")
    if not isinstance(header, dict):
        raise _broken(file, f"its header is a JSON {type(header).__name__}, expected an object")
    return header


def _offsets(file: Path, name: str, entry: object) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise _broken(file, f"tensor {name} has data_offsets {offsets!r}, expected two whole numbers")
    return offsets[0], offsets[1]


def _shape(file: Path, name: str, entry: dict[str, Any]) -> Shape:
    shape = entry.get("shape")
    if not _whole_numbers(shape):
        raise _broken(file, f"tensor {name} has shape {shape!r}, expected a list of whole numbers")
    return tuple(shape)


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _read_blocks(file: Path, begin: int, end: int, start: int = 0, stop: int | None = None) -> Blocks:
    """Bytes ``start`` to ``stop`` of the tensor that lies at ``begin`` to ``end`` of the file."""
    length = (end if stop is None else min(end, begin + stop)) - begin - start
    with open(file, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # read further ahead
        stream.seek(begin + start)
        buffer = memoryview(bytearray(min(length, BLOCK_BYTES)))
        while length:
            block = buffer[: min(length, BLOCK_BYTES)]
            done = 0
            while done < len(block):
                count = stream.readinto(block[done:])
                if not count:
                    raise _broken(file, "it became shorter while it was read")
                done += count
            yield block
            length -= len(block)


def _broken(file: Path, what: str) -> UsageError:
    advice = f"Download or copy it again, and check its size.{what_stands_here(file)}"
    return UsageError(f"{file} is not a complete safetensors file: {what}. {advice}")
