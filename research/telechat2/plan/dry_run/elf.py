"""Just enough of the ELF format to see what a shared library defines, lacks, links to and mentions.

64-bit little-endian files, which are those of x86-64 and aarch64. Written out here because users' machines
need not have binutils, and MindSpore's wheel brings no ELF reader.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from research.telechat2.common.errors import UsageError

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_GNU_VERSYM = 6, 11, 0x6FFFFFFF
_DT_NEEDED = 1
_STB_WEAK = 2


class Library(NamedTuple):
    """The dynamic symbols of a shared library, and the names of the libraries it is linked to."""

    defined: set[str]
    undefined: set[str]
    needed: set[str]


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def read_library(path: str | Path) -> Library:
    """What ``path`` defines, lacks and is linked to.

    ``undefined`` leaves out what may stay undefined (weak symbols) and what is asked of a certain version of
    a library: only glibc, libstdc++ and their like have versions.

    Raises:
        UsageError: ``path`` is not a 64-bit little-endian ELF file.
    """
    with _open(path) as (data, sections):
        by_kind = {section.kind: section for section in sections}
        needed: set[str] = set()
        if dynamic := by_kind.get(_SHT_DYNAMIC):
            names = sections[dynamic.link].offset
            for tag, value in struct.iter_unpack("<qQ", _bytes(data, dynamic)):
                if tag == _DT_NEEDED:
                    needed.add(_text(data, names + value))
        defined: set[str] = set()
        undefined: set[str] = set()
        if table := by_kind.get(_SHT_DYNSYM):
            names = sections[table.link].offset
            count = table.size // _SYMBOL.size
            versions: tuple[int, ...] = (0,) * count
            if versioned := by_kind.get(_SHT_GNU_VERSYM):
                versions = struct.unpack(f"<{count}H", _bytes(data, versioned))
            for symbol, version in zip(_SYMBOL.iter_unpack(_bytes(data, table)), versions, strict=True):
                name, info, _, section = symbol[:4]
                if section:
                    defined.add(_text(data, names + name))
                elif name and info >> 4 != _STB_WEAK and version < 2:
                    undefined.add(_text(data, names + name))
        return Library(defined, undefined, needed)


def mentioned(path: str | Path, pattern: str) -> set[str]:
    """The whole strings of ``path``'s read-only data that match the regular expression ``pattern``.

    Raises:
        UsageError: ``path`` is not a 64-bit little-endian ELF file.
    """
    search = re.compile(rb"\0(" + pattern.encode() + rb")(?=\0)")
    with _open(path) as (data, sections):
        (index,) = struct.unpack_from("<H", data, 62)
        names = sections[index].offset
        read_only = [section for section in sections if _text(data, names + section.name) == ".rodata"]
        found = {match for section in read_only for match in search.findall(b"\0" + _bytes(data, section))}
    return {match.decode() for match in found}


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[mmap.mmap, list[_Section]]]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            raise UsageError(f"{path} is not a 64-bit little-endian ELF file.")
        (offset,) = struct.unpack_from("<Q", data, 40)
        _, count = struct.unpack_from("<HH", data, 58)
        yield data, [_Section(*_SECTION.unpack_from(data, offset + i * _SECTION.size)) for i in range(count)]


def _bytes(data: mmap.mmap, section: _Section) -> bytes:
    return data[section.offset : section.offset + section.size]


def _text(data: mmap.mmap, offset: int) -> str:
    return data[offset : data.find(b"\0", offset)].decode()
