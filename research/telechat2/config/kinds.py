"""What a setting's value may be, and how a YAML's value is read as such.

YAML 1.1 reads ``1e-5`` as text: a number needs a point and a signed exponent there. Such text is read as the
number that it is. Quoted truth values and whole numbers stay errors: ``"False"`` would be taken for true.
"""

import math
import operator
import re
import sys
from numbers import Integral, Real
from typing import Any, TypeGuard

from research.telechat2.common.errors import UsageError

_GIGABYTES = re.compile(r"[1-9]\d*(\.\d*)?GB|0\.\d*[1-9]\d*GB")  # what MindSpore reads
_SPELLED = {"gigabytes": _GIGABYTES, "prefix": re.compile(r"[^/]*"), "level": re.compile(r"O[0-2]")}
_ITEMS = {"reals": "real", "wholes": "whole", "texts": "text", "sections": "section"}  # of a list
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_TYPES: dict[str, Any] = {"text": str, "list": (list, tuple), "section": dict, "null": type(None)}
_BOUNDS: dict[str, tuple[str, Any]] = {
    "least": ("at least", operator.ge), "most": ("at most", operator.le),
    "above": ("above", operator.gt), "below": ("below", operator.lt),
}  # fmt: skip
EXPECTED = {
    "bool": "True or False, without quotes",
    "whole": "a whole number, in digits and without quotes",
    "count": "a whole number of at least 1, in digits and without quotes",
    "real": "a finite number, such as 1.0e-5",
    "text": "text",
    "list": "a list",
    "wholes": "a list of whole numbers, such as [1, 6]",
    "reals": "a list of numbers, such as [0.9, 0.95]",
    "texts": "a list of texts",
    "section": "a section of settings",
    "sections": "a list of sections, such as [{type: MFLossMonitor}]",
    "gigabytes": "text such as '58GB'",
    "prefix": "text without a slash",
    "level": "O0, O1 or O2",
    "null": "null",
}


def table(text: str) -> dict[str, str]:
    """``"epochs:whole seed:any"`` as a dictionary of key and kind: of EXPECTED, or ``any``."""
    return {key: kind for key, kind in (word.split(":") for word in text.split())}


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number; True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return bool(abs(float(value) if not isinstance(value, Integral) else int(value)) <= sys.float_info.max)


def check_bool(name: str, value: object) -> None:
    """UsageError if the setting ``name`` is neither True nor False: the text "False" is taken for true."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be {EXPECTED['bool']}.")


def check_number(name: str, value: object, *, whole: bool = False, **bounds: float) -> None:
    """UsageError if the setting ``name`` is no finite number, not ``whole``, or out of its bounds.

    ``bounds``: ``least``, ``most``, ``above``, ``below``.
    """
    is_one = is_whole(value) if whole else is_number(value)
    if not is_one or not all(_BOUNDS[key][1](value, bound) for key, bound in bounds.items()):
        raise UsageError(f"{name} is {value!r}; it must be {expected_number(whole=whole, **bounds)}.")


def check_divisible(name: str, value: int, by: str, divisor: int, advice: str = "change one of them") -> None:
    """UsageError if the setting ``name`` is not divisible by the setting or product ``by``."""
    if value % divisor:
        raise UsageError(f"{name} {value} is not divisible by {by} {divisor}; {advice}.")


def expected_number(*, whole: bool = False, **bounds: float) -> str:
    """In words what check_number accepts."""
    listed = " and ".join(f"{_BOUNDS[key][0]} {bound}" for key, bound in bounds.items())
    return f"{'a whole number' if whole else 'a number'}{', ' if listed else ''}{listed}"


def read_value(kind: str, value: object) -> object:
    """``value`` as one of the kinds that ``kind`` lists, ``a|b``; a text that is a number becomes one.

    Raises:
        UsageError: it is of none of them; the message ends "…; it must be …".
    """
    kinds = kind.split("|")
    if "any" in kinds or any(_is(name, value) for name in kinds):
        return value
    if value is None and not {"text", "gigabytes", "prefix", "level"}.isdisjoint(kinds):
        return value  # `load_checkpoint:` with nothing behind it
    if "real" in kinds and (number := _number(value)) is not None:
        return number
    if "reals" in kinds and isinstance(value, (list, tuple)):
        numbers = [item if is_number(item) else _number(item) for item in value]
        if None not in numbers:
            return numbers
    expected = " or ".join(EXPECTED[name] for name in kinds)
    raise UsageError(f"is {value!r}; it must be {expected}{_hint(kinds, value)}")


def _is(kind: str, value: object) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("whole", "count"):
        return is_whole(value) and (kind == "whole" or value >= 1)
    if kind == "real":
        return is_number(value)
    if kind in _ITEMS:
        return isinstance(value, (list, tuple)) and all(_is(_ITEMS[kind], item) for item in value)
    if kind in _SPELLED:
        return isinstance(value, str) and bool(_SPELLED[kind].fullmatch(value))
    return isinstance(value, _TYPES[kind])


def _number(value: object) -> float | None:
    """The number that a text is, None where it is none."""
    number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else math.inf
    return number if math.isfinite(number) else None


def _hint(kinds: list[str], value: object) -> str:
    """How to write what was meant, where that is plain."""
    if "bool" in kinds and str(value).lower() in ("true", "yes", "on", "1"):
        return ": True"
    if "bool" in kinds and str(value).lower() in ("false", "no", "off", "0"):
        return ": False"
    if not {"whole", "count"}.isdisjoint(kinds) and isinstance(value, (str, float)):
        number = _number(str(value))
        if number is not None and number == int(number) and ("whole" in kinds or number >= 1):
            return f": {int(number)}"
    if "gigabytes" in kinds and (found := re.fullmatch(r"0*([1-9]\d*(?:\.\d+)?) *G?I?B?", str(value), re.I)):
        return f": '{found[1]}GB'"
    if "sections" in kinds and isinstance(value, list) and value and _is("texts", value):
        return f": [{', '.join(f'{{type: {name}}}' for name in value)}]"
    if kinds == ["text"] and isinstance(value, (int, float)) and not isinstance(value, bool):
        return f", in quotes: '{value}'"
    return ""
