"""What the settings of sampling may be: rules that need neither MindSpore nor NumPy."""

import difflib
from collections.abc import Iterable, Mapping

from research.telechat2.common.errors import UsageError
from research.telechat2.config.fields import settings_of
from research.telechat2.config.model_settings import Sampling

# Each setting with the value that leaves the distribution as the model has it; None does so, too.
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
SAMPLING = ("do_sample", *NEUTRAL)
# What only a drawn token depends on; the likeliest one stays the same.
DRAWN_ONLY = ("temperature", "top_k", "top_p")


def check_sampling(values: Mapping[str, object]) -> None:
    """Refuse settings that no distribution follows from; other names in ``values`` are passed over.

    None: the neutral value. The rules are those of the fields of ``Sampling``.

    Raises:
        UsageError: with the setting, its value and what it may be.
    """
    settings = settings_of(Sampling)
    for name in SAMPLING:
        if values.get(name) is not None:
            settings[name].check(values[name])


def check_spelling(names: Iterable[str]) -> None:
    """UsageError if one of ``names``, which no library knows, is nearly a setting of sampling."""
    for name in names:
        if meant := difflib.get_close_matches(name, SAMPLING, n=1, cutoff=0.8):
            raise UsageError(f"{name} is no setting of an answer. Did you mean {meant[0]}?")
