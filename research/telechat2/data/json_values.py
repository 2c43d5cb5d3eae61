"""A file that is one JSON array, or JSON objects over several lines each, item by item.

Such a file may be larger than memory, so it is read a part at a time. The items keep their bytes, and are
parsed again by whoever encodes them.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from research.telechat2.common.errors import UsageError

_CHUNK = 1 << 20  # characters
_ARRAY_OF_OBJECTS = re.compile(r"\[\s*\{")
_VISIBLE = re.compile(r"[^ \t\r\n\ufeff]")  # byte order marks stand where files were joined
_scan = json.JSONDecoder(parse_int=float).raw_decode  # int refuses more than 4300 digits


def is_one_value(path: Path, head: bytes) -> bool:
    """Whether a file whose text begins with ``head`` is read by ``items`` rather than by lines.

    It begins with an array of objects, a ``.json`` with any array or object;
    its first line is no whole value, or the only one.
    """
    text = head.decode("utf-8", "replace").lstrip(" \t\r\n\ufeff")
    is_json = ".json" in (suffix.lower() for suffix in path.suffixes)
    if not (text[:1] in ("[", "{") if is_json else _ARRAY_OF_OBJECTS.match(text)):
        return False
    line, border, others = text.partition("\n")
    try:
        _scan(line)
    except (json.JSONDecodeError, RecursionError):
        return bool(border) or text[0] == "["
    return text[0] == "[" and not others.strip()


def items(path: Path, file: BinaryIO, longest: int) -> Iterator[bytes]:
    """Yield the items of the arrays in a file, and the objects that stand in none.

    UsageError for an item of more than ``longest`` characters, and a file that is not JSON or not UTF-8.
    """
    text = _Text(path, io.TextIOWrapper(file, "utf-8", newline=""))
    number, in_array = 0, False
    while (character := text.peek()) or in_array:
        if not character:
            raise UsageError(f"{path} ends within its array, after item {number}; fetch it again")
        if character == "[" and not in_array:
            text.at += 1
            in_array = text.peek() != "]"
            text.at += not in_array
            continue
        number += 1
        yield text.value(number, longest).encode("utf-8", "surrogatepass")
        if not in_array:
            continue
        behind = text.peek()
        if behind not in ("", ",", "]"):
            raise UsageError(f"{path}: {behind!r} follows item {number}; expected a comma, or ] at the end")
        text.at += 1
        in_array = behind != "]"


class _Text:
    """The text of a file, of which a part is in memory."""

    def __init__(self, path: Path, file: io.TextIOBase):
        self.path, self.file = path, file
        self.text, self.at = "", 0

    def peek(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            if found := _VISIBLE.search(self.text, self.at):
                self.at = found.start()
                return found[0]
            self.at = len(self.text)
            if not self._more(_CHUNK):
                return ""

    def skip(self) -> None:
        """Go one character on."""
        self.at += 1

    def value(self, number: int, longest: int) -> str:
        """Take the next JSON value, which is item ``number``."""
        while True:
            try:
                _, end = _scan(self.text, self.at)
                if end < len(self.text) or self.text[end - 1] in ']}"':
                    break  # a number may go on
                problem = ""
            except (json.JSONDecodeError, RecursionError) as error:
                problem = getattr(error, "msg", str(error))
            left = len(self.text) - self.at
            if left > longest:
                raise UsageError(f"{self.path}, item {number} is not JSON, or longer than {longest >> 20} MB")
            if not self._more(max(_CHUNK, left)):
                if not problem:
                    break
                expected = "the file begins as a JSON array or object, so all of it must be JSON"
                raise UsageError(f"{self.path}, item {number}: not JSON ({problem}); {expected}")
        found, self.at = self.text[self.at : end], end
        return found

    def _more(self, size: int) -> bool:
        try:
            new = self.file.read(size)
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.path}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
        self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)
