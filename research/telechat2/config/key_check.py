"""Whether every key of a YAML is read by something, and every value is of its kind."""

import difflib

from research.telechat2.common.errors import UsageError
from research.telechat2.config.classes import GROUPS, OWN_KEYS, PLACES, TELECHAT_CONFIGS
from research.telechat2.config.fields import kinds_of
from research.telechat2.config.kinds import read_value
from research.telechat2.config.model import LIBRARY_KEYS, OTHERS_KEYS
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.overrides import did_you_mean
from research.telechat2.config.places import elsewhere, settings_like
from research.telechat2.config.sections import Settings, sections_at
from research.telechat2.config.tables import SECTIONS

MODEL = "model.model_config"
_MOST_LISTED = 12  # names in a message


def read_keys(settings: Settings) -> tuple[list[str], list[str]]:
    """Read every value by its kind, in place.

    Text that is a number becomes one where a number is expected: YAML 1.1 reads ``1e-5`` as text.

    Returns:
        A message for each key that nothing reads, which is taken out, and one for each value that is wrong.
    """
    unread, misread = [], []
    for path, known in SECTIONS.items():
        for place, section in sections_at(settings, path):
            misread += _read_values(section, known, place)
            unread += _take_unread(section, known, place)
    for path, group in PLACES.items():
        for place, section in sections_at(settings, path):
            for found, more in zip((unread, misread), _read_class(section, group, place), strict=True):
                found += more
    return _once(unread), _once(misread)


def _once(problems: list[str]) -> list[str]:
    """Without those of a task's dataset_config, which is the data set's section once more."""
    named = [problem.replace("_dataset_task.dataset_config", "_dataset") for problem in problems]
    pairs = dict.fromkeys(zip(problems, named, strict=True))
    return [problem for problem, name in pairs if name == problem or name not in problems]


def _read_class(section: Settings, group: str, place: str) -> tuple[list[str], list[str]]:
    """A section whose ``type`` names its class, as read_keys; of one of the user's own, nothing is known."""
    name = section.get("type")
    if group == "config" and name in (None, *TELECHAT_CONFIGS):
        return _read_model(section)
    if not isinstance(name, str) or name not in GROUPS[group]:
        return [], _unknown_type(section, group, place)
    arguments = GROUPS[group][name]
    if arguments is None:
        return [], []
    known = arguments | OWN_KEYS | ({"params": "texts"} if ".grouped[" in place else {})
    unread = _take_foreign(section, group, place, known)
    misread = _read_values(section, known, place)
    return unread + _take_unread(section, known, place), misread


def _take_foreign(section: Settings, group: str, place: str, known: dict[str, str]) -> list[str]:
    """Take out the arguments of other classes of the group; a message for each that is not null.

    Null takes back what a base YAML states for the class that it names.
    """
    others = {key for arguments in GROUPS[group].values() if arguments for key in arguments} - known.keys()
    problems = []
    for key in [key for key in section if key in others]:
        value = section.pop(key)
        if value is not None:
            problems.append(
                f"{place}.{key} is {value!r}, and {section['type']} has no such argument; remove it, or "
                f"where a base YAML states it write {key}: null. {_close(key, section, list(known))}".rstrip()
            )
    return problems


def _unknown_type(section: Settings, group: str, place: str) -> list[str]:
    if "auto_register" in section or ("type" not in section and group in ("tokenizer", "metric", "model")):
        return []
    known = sorted(GROUPS[group])
    return [
        f"{place}.type is {section.get('type')!r}, which is no class that a YAML may name here without "
        f"auto_register. {did_you_mean(str(section.get('type')), known)}"
    ]


def _read_model(section: Settings) -> tuple[list[str], list[str]]:
    kinds = kinds_of(ModelSettings)
    misread = _read_values(section, kinds, MODEL)
    others = [key for key in section if key in OTHERS_KEYS]
    unread = [
        f"{MODEL}.{key}: this model does not have it. {OTHERS_KEYS[key]}. Remove {key}." for key in others
    ]
    for key in others:
        del section[key]
    return unread + _take_unread(section, kinds, MODEL, LIBRARY_KEYS), misread


def _take_unread(
    section: Settings, known: dict[str, str], place: str, others: tuple[str, ...] = ()
) -> list[str]:
    """Take out the keys that nothing reads; a message for each."""
    prefix = f"{place}." if place else ""
    keys = [key for key in section if key not in known and key not in others]
    problems = [_unread(str(key), section, list(known), prefix) for key in keys]
    for key in keys:
        del section[key]
    return problems


def _read_values(section: Settings, known: dict[str, str], place: str) -> list[str]:
    problems = []
    for key in section.keys() & known.keys():
        if section[key] is None and known[key].startswith(("section", "list")):
            del section[key]  # `checkpoint:` with nothing behind it: as if it were not there
            continue
        try:
            section[key] = read_value(known[key], section[key])
        except UsageError as error:
            problems.append(f"{place}.{key} {error}.".lstrip("."))
    return sorted(problems)


def _unread(key: str, section: Settings, known: list[str], prefix: str) -> str:
    hint = _hint(key, section, known, prefix)
    return f"the setting {prefix}{key} is read by nothing; remove or correct it. {hint}"


def _hint(key: str, section: Settings, known: list[str], prefix: str = "") -> str:
    """The key that may be meant, or that it is there already, or in another section; without any, all that
    are not there, if few."""
    if (meant := elsewhere(key)) and meant.removeprefix(prefix) in known:
        return f"Did you mean {meant}?"
    if close := _close(key, section, known):
        return close
    if near := settings_like(prefix + key):
        return f"Did you mean {' or '.join(near)}?"
    return _listed([name for name in known if name not in section])


def _close(key: str, section: Settings, known: list[str]) -> str:
    """The known key that is like ``key``, or that it is there already; empty without any."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if close and close[0] in section:
        return f"{close[0]} is there as well, and is {section[close[0]]!r}."
    close = [name for name in close if name not in section]
    return f"Did you mean {' or '.join(close)}?" if close else ""


def _listed(names: list[str]) -> str:
    return f"Known are {', '.join(names)}." if 0 < len(names) <= _MOST_LISTED else "No key is like it."
