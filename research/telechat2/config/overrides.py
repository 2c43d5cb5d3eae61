"""Changes of a YAML's settings by the command line."""

import argparse
import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from research.telechat2.common.errors import UsageError
from research.telechat2.config.places import is_setting, settings_like
from research.telechat2.config.sections import Settings
from research.telechat2.config.tables import SECTIONS


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, which makes no Python objects; with numbers of YAML 1.2, and no key twice.

    YAML 1.1 reads ``1e-5`` as text, and of a key that stands twice the last wins without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str | None, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    "in a section", node.start_mark, f"the key {name} stands twice, first in line "
                    f"{seen[name]}; remove one", key.start_mark,
                )  # fmt: skip
            seen[name] = key.start_mark.line + 1
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> object:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is none, or a section has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def boolean(text: str) -> bool:
    """Read True or False, in any case: an argparse type."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


def boolean_or_text(text: str) -> bool | str:
    """Read True or False, or anything else as text: an argparse type."""
    return boolean(text) if text.lower() in ("true", "false") else text


def parse_value(text: str) -> object:
    """The value a word on the command line stands for, as YAML reads it: True, 3, 1e-4, [1, 2], null, text.

    Unlike YAML 1.1, ``1e-4`` is a number, and ``12:30``, ``010`` and dates stay text.
    """
    if re.fullmatch(r"[-+]?(0|[1-9]\d{,999})", text):  # Python makes no number of thousands of digits
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", text) and not re.fullmatch(
        r"[-+]?0\d+", text
    ):
        return float(text)
    if text in ("null", "~", ""):
        return None if text else ""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text[0] in "[{\"'":
        try:
            return load_yaml(text)
        except yaml.YAMLError:
            return text
    return text


def value_word(value: object) -> str:
    """``value`` as a word that ``parse_value`` reads back as the same."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    return text if parse_value(text) == value else json.dumps(text, ensure_ascii=False)


def parse_overrides(words: list[str]) -> dict[str, object]:
    """Read ``--a.b.c value`` and ``--a.b.c=value`` pairs into ``{"a.b.c": value}``.

    Raises:
        UsageError: a value without a key, or a key without a value.
    """
    overrides: dict[str, object] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(f"unexpected argument {word!r}: a setting is given as --section.key value.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{key} is given without a value; expected --{key} VALUE.")
            text = rest.pop(0)
        overrides[key] = parse_value(text)
    return overrides


def parse_options(words: list[str]) -> dict[str, object]:
    """Read the ``key=value`` words of ``--options``; ``a,b`` is a list.

    Raises:
        UsageError: a word without ``=``.
    """
    options: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--options {word}: expected key=value.")
        options[key] = (
            [parse_value(part) for part in text.split(",")] if _is_bare_list(text) else parse_value(text)
        )
    return options


def _is_bare_list(text: str) -> bool:
    return "," in text and text[0] not in "[{\"'"


# MindFormers' own sections, which an override may make, also inside of others; "": the top-level keys.
_TEMPLATE: dict[str, Settings] = {key: {} for key, kind in SECTIONS[""].items() if kind.startswith("section")}
_TEMPLATE |= {path: {} for path in SECTIONS if "." in path and "_dataset" not in path}
_TEMPLATE[""] = dict.fromkeys(SECTIONS[""])


def apply_overrides(config: Settings, overrides: Mapping[str, object]) -> None:
    """Set every ``a.b.c`` of ``overrides`` in ``config``, in place.

    A key that is new in a section is set, as MindFormers does; a section that is nowhere, or a new top-level
    key, is a typo.

    Args:
        config: the raw settings.
        overrides: dotted key to value.

    Raises:
        UsageError: a section or top-level key that neither the config nor MindFormers knows.
    """
    for key, value in overrides.items():
        *sections, last = key.split(".")
        if not sections and last not in config and last not in _TEMPLATE[""]:
            known = sorted({*config, *_TEMPLATE[""]})
            raise UsageError(
                f"{key} is neither an argument nor a key of the config. {_instead(key, last, known)}"
            )
        target: Any = config
        known_section: Settings | None = _TEMPLATE
        for depth, section in enumerate(sections):
            path = ".".join(sections[: depth + 1])
            if not target.get(section) and path in _TEMPLATE:
                target[section] = {}
            elif section not in target:
                known = sorted({*target, *(known_section or ())} - {""})
                hint = _instead(key, section, known)
                raise UsageError(f"{key}: the config has no section `{path}`. {hint}")
            target[section] = {} if target[section] is None else target[section]
            target, known_section = target[section], None
            if not isinstance(target, dict):
                kind = (
                    "a list; change it in the YAML" if isinstance(target, list) else f"the value {target!r}"
                )
                raise UsageError(f"{key}: `{path}` is no section but {kind}.")
        target[last] = value


def _instead(key: str, name: str, known: list[str]) -> str:
    """The end of a message about ``key``, of which ``name`` is unknown beside ``known``."""
    if is_setting(key):
        above = key.partition(f".{name}.")[0]
        empty = f"Its `{above}` is empty: use" if not known else "Use"
        return f"{empty} a YAML that has it, finetune_….yaml for training, predict_….yaml for prediction."
    near = settings_like(key)
    if near and near[0].endswith(f".{key}"):
        return f"Did you mean --{near[0]}?"
    if difflib.get_close_matches(name, known, n=1, cutoff=0.75) or not near:
        return did_you_mean(name, known)
    dashes = "" if "." in key else "--"
    return f"Did you mean {' or '.join(dashes + path for path in near)}?"


def did_you_mean(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not close and not known:
        return ""
    return f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(known)}."
