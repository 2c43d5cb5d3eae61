"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps.

Parsed and written here, rather than by the library, so that a tensor's bytes move from file to file in
blocks, whatever the size of the checkpoint, and so that a broken file is refused with a sentence.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

from research.telechat2.checkpoint.storage.dtypes import NOT_READ
from research.telechat2.checkpoint.storage.tensor import BLOCK_BYTES, StoredTensor
from research.telechat2.common.errors import UsageError
from research.telechat2.common.placeholders import what_stands_here

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}


def read_safetensors(file: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of their bytes; only the header is read.

    Raises:
        UsageError: the file is not safetensors, or is cut off.
    """
    with open(file, "rb") as stream:
        header = _read_header(file, stream)
        data_start, size = stream.tell(), os.fstat(stream.fileno()).st_size
    header.pop("__metadata__", None)
    tensors, end = [], 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(file, *item)):
        begin, next_begin = _offsets(file, name, entry)
        code, shape = entry.get("dtype"), _shape(file, name, entry)
        if not isinstance(code, str) or code not in ITEM_BYTES:
            raise UsageError(f"{file}: tensor {name} is stored as {code!r}, but {NOT_READ}.")
        if begin != end or next_begin - begin != prod(shape) * ITEM_BYTES[code]:
            raise _broken(
                file,
                f"tensor {name}, {code} {list(shape)}, is said to lie at bytes {begin} to {next_begin} "
                f"of the data; expected {prod(shape) * ITEM_BYTES[code]} bytes from byte {end}",
            )
        end = next_begin
        blocks = partial(_read_blocks, file, data_start + begin, data_start + next_begin)
        extents = ((file, data_start + begin, data_start + next_begin),)
        tensors.append(StoredTensor(name, CODES.get(code, code), shape, file, blocks, extents))
    if data_start + end != size:
        raise _broken(
            file, f"its header describes a file of {data_start + end} bytes, the file has {size} bytes"
        )
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """What a file's header says beside its tensors, such as ``{"format": "ms"}``, if anything.

    Raises:
        UsageError: the file is not safetensors.
    """
    with open(file, "rb") as stream:
        metadata = _read_header(file, stream).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The head of a file of ``tensors`` (name -> dtype, shape) in this order.

    ``metadata`` has a ``format``, pt or ms, and may say more.
    """
    codes = {dtype: code for code, dtype in CODES.items()}
    header: dict = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + prod(shape) * ITEM_BYTES[codes[dtype]]
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def _read_header(file: Path, stream: BinaryIO) -> dict:
    """The parsed header; afterwards ``stream`` stands where the data begins."""
    size, start = os.fstat(stream.fileno()).st_size, stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise _broken(
            file, f"its first 8 bytes announce a header of {length} bytes, the file has {size} bytes"
        )
    return _parse_header(file, stream.read(length))


def _parse_header(file: Path, text: bytes) -> dict:
    repeated = []

    def collect(pairs: list[tuple[str, object]]) -> dict:
        repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of thousands of digits
        raise _broken(file, f"its header is not JSON ({error})") from None
    if repeated:
        raise _broken(file, f"its header has {len(repeated)} names twice: {', '.join(repeated[:10])}")
    if not isinstance(header, dict):
        raise _broken(file, f"its header is a JSON {type(header).__name__}, expected an object")
    return header


def _offsets(file: Path, name: str, entry: object) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise _broken(file, f"tensor {name} has data_offsets {offsets!r}, expected two whole numbers")
    return offsets[0], offsets[1]


def _shape(file: Path, name: str, entry: dict) -> tuple[int, ...]:
    if not _whole_numbers(entry.get("shape")):
        raise _broken(
            file, f"tensor {name} has shape {entry.get('shape')!r}, expected a list of whole numbers"
        )
    return tuple(entry["shape"])


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _read_blocks(
    file: Path, begin: int, end: int, start: int = 0, stop: int | None = None
) -> Iterator[memoryview]:
    """Bytes ``start`` to ``stop`` of the tensor that lies at ``begin`` to ``end`` of the file."""
    length = (end if stop is None else min(end, begin + stop)) - begin - start
    with open(file, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # read further ahead
        stream.seek(begin + start)
        buffer = memoryview(bytearray(min(length, BLOCK_BYTES)))
        while length:
            block = buffer[: min(length, BLOCK_BYTES)]
            _fill(stream, block, file)
            yield block
            length -= len(block)


def _fill(stream: BinaryIO, block: memoryview, file: Path) -> None:
    done = 0
    while done < len(block):
        count = stream.readinto(block[done:])
        if not count:
            raise _broken(file, "it became shorter while it was read")
        done += count


def _broken(file: Path, what: str) -> UsageError:
    return UsageError(
        f"{file} is not a complete safetensors file: {what}. Download or copy it again, and check its size."
        + what_stands_here(file)
    )
