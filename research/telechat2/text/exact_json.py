"""JSON that is read without loss: digits stay as they were written, and a key stands once.

Python's reader turns ``1e400`` into infinity, ``0.10`` into ``0.1``, and keeps the last value of a key.
"""

import json
from typing import Any, Self

from research.telechat2.common.errors import UsageError

JsonObject = dict[str, Any]
_TOO_DEEP = "it is nested too deeply"


class Digits(float):
    """A number whose digits a float or an int would change; ``text`` is how it was written."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        number.text = text
        return number


def loads(text: str) -> object:
    """Parse JSON, or raise JSONDecodeError; UsageError for a key that stands twice, and too deep nesting."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise UsageError(_TOO_DEEP) from None


def dumps(value: object) -> str:
    """Write ``value`` on one line, as ``json.dumps`` does, with the digits that ``loads`` has read.

    UsageError for NaN and Infinity, and for too deep nesting.
    """
    try:
        return _dumps(value)
    except RecursionError:
        raise UsageError(_TOO_DEEP) from None


def _dumps(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)}: {_dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_dumps, value)) + "]"
    if isinstance(value, Digits):
        return value.text
    if isinstance(value, float) and value - value != 0:
        raise UsageError(f"it holds {json.dumps(value)}, which JSON does not have; expected a number")
    return json.dumps(value, ensure_ascii=False)


def _key(key: object) -> str:
    return json.dumps(key, ensure_ascii=False) if isinstance(key, str) else json.dumps({key: 0})[1:-4]


def _float(text: str) -> float:
    number = float(text)
    return number if repr(number) == text else Digits(text)


def _int(text: str) -> int | Digits:
    # Python reads -0 as 0, and refuses more than 4300 digits
    return Digits(text) if text == "-0" or len(text) > 4000 else int(text)


def _object(pairs: list[tuple[str, object]]) -> JsonObject:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UsageError(f"the key {twice!r} stands {keys.count(twice)} times in one object; keep one")
    return content


_DECODER = json.JSONDecoder(parse_float=_float, parse_int=_int, object_pairs_hook=_object)
