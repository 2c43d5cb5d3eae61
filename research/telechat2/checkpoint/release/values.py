"""Values of a config.json, each of the type that it must have."""

import math
from collections.abc import Mapping
from typing import Any

from research.telechat2.common.errors import UsageError

Config = Mapping[str, Any]  # the content of a config.json


def number(config: Config, key: str, default: float) -> float:
    """A positive number of a config.

    Raises:
        UsageError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"the config says {key} = {value!r}; expected a positive number")
    return float(value)


def whole_number(config: Config, key: str, default: int) -> int:
    """A positive whole number of a config.

    Raises:
        UsageError: it is something else.
    """
    value = number(config, key, default)
    if value != int(value):
        raise UsageError(f"the config says {key} = {value!r}; expected a whole number")
    return int(value)


def one_of(config: Config, keys: tuple[str, ...]) -> str | None:
    """The key of ``keys`` that a config gives one value under; None if it has none of them.

    Raises:
        UsageError: it has several, with different values.
    """
    given = [key for key in keys if config.get(key) is not None]
    if any(config[key] != config[given[0]] for key in given[1:]):
        listed = " and ".join(f"{key} = {config[key]!r}" for key in given)
        raise UsageError(f"the config says {listed}, which are one setting; correct or remove one of them")
    return given[0] if given else None


def flag(config: Config, key: str) -> bool:
    """Whether a config says yes; absent is no.

    Raises:
        UsageError: it says something else.
    """
    value = config.get(key)
    if value not in (None, True, False):
        raise UsageError(f"the config says {key} = {value!r}; expected true or false")
    return bool(value)
