"""What the settings of sampling may be: rules that need neither MindSpore nor NumPy."""

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

from research.telechat2.common.errors import UsageError

# Each setting with the value that leaves the distribution as the model has it; None does so, too.
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SAMPLING = ("do_sample", *NEUTRAL)
# What only a drawn token depends on; the likeliest one stays the same.
DRAWN_ONLY = ("temperature", "top_k", "top_p")


def check_sampling(values: Mapping[str, object]) -> None:
    """Refuse settings that no distribution follows from; other names in ``values`` are passed over.

    ``do_sample``: True or False. ``temperature``, ``repetition_penalty``: finite numbers above 0. ``top_k``:
    a whole number, 0 for all tokens. ``top_p``: above 0, at most 1, which is all tokens. None: the neutral
    value.

    Raises:
        UsageError: with the setting, its value and what it may be.
    """
    for name in SAMPLING:
        if (value := values.get(name)) is not None:
            expected = _EXPECTED[name]
            if not _RULES[name](value):
                raise UsageError(f"{name} is {value!r}; expected {expected}.")


def check_spelling(names: Iterable[str]) -> None:
    """UsageError if one of ``names``, which no library knows, is nearly a setting of sampling."""
    for name in names:
        if meant := difflib.get_close_matches(name, SAMPLING, n=1, cutoff=0.8):
            raise UsageError(f"{name} is no setting of an answer. Did you mean {meant[0]}?")


def _is_positive(value) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_RULES = {
    "do_sample": lambda value: isinstance(value, bool),
    "temperature": _is_positive,
    "top_k": lambda value: isinstance(value, Integral) and not isinstance(value, bool) and value >= 0,
    "top_p": lambda value: _is_number(value) and 0 < value <= 1,
    "repetition_penalty": _is_positive,
}
_EXPECTED = {
    "do_sample": "True (draw each token) or False (take the likeliest)",
    "temperature": "a finite number above 0; 1.0 is off, and do_sample False takes the likeliest token",
    "top_k": "a whole number of tokens; 0 is off",
    "top_p": "a number above 0 and at most 1; 1.0 is off",
    "repetition_penalty": "a finite number above 0; 1.0 is off",
}
