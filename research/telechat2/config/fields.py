"""A setting as a field of a dataclass: its type and default, and in its metadata help, unit and rule."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.kinds import check_bool, check_number, expected_number

T = TypeVar("T")
_KINDS: dict[object, str] = {
    int: "whole", float: "real", bool: "bool", str: "text", dict: "section", list[Any]: "list",
    NoneType: "null", object: "any", list[int]: "wholes", list[float]: "reals", list[str]: "texts",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: its key in the YAML.
        kind: what the YAML may say, see kinds.py.
        default: where the YAML says nothing; None may mean that it follows from other settings.
        help: what it does.
        unit: of a number.
        bounds: of a number: ``least``, ``most``, ``above``, ``below``.
        choices: the values that it may have; empty: any of its kind.
    """

    name: str
    kind: str
    default: object
    help: str
    unit: str
    bounds: Mapping[str, float]
    choices: tuple[object, ...]

    def check(self, value: object, section: str = "") -> None:
        """Raise UsageError if ``value`` breaks the rule of a truth value, of bounds, or of choices."""
        name = f"{section}.{self.name}".lstrip(".")
        if self.choices and value not in self.choices:
            text = f"{name} is {value!r}; it must be {self.rule()}. Set it so, or leave it out."
            raise UsageError(f"{text} {self.help}".rstrip())
        if self.kind == "bool":
            check_bool(name, value)
        elif self.bounds and not (value is None and "null" in self.kind):
            check_number(name, value, whole="whole" in self.kind, **self.bounds)

    def rule(self) -> str:
        """What it may be, in words."""
        if self.choices:
            return " or ".join(map(str, self.choices))
        return expected_number(whole="whole" in self.kind, **self.bounds) if self.bounds else ""


def setting(
    default: T,
    help: str,  # noqa: A002 the word of argparse
    *,
    unit: str = "",
    choices: tuple[object, ...] = (),
    **bounds: float,
) -> T:
    """A field of a section; ``bounds`` and ``choices`` as those of Setting."""
    return field(default=default, metadata={"help": help, "unit": unit, "bounds": bounds, "choices": choices})


def follows(help: str, **rule: Any) -> Any:  # noqa: A002
    """A field that follows from others where the YAML does not state it, or states null."""
    return setting(None, help, **rule)


def only(default: T) -> T:
    """A field of MindFormers whose other values ask for what this model does not have."""
    return setting(default, "", choices=(default,))


@cache  # searches ask thousands of times
def settings_of(section: type) -> dict[str, Setting]:
    """The settings of a section's dataclass, by name; fields of other dataclasses are none."""
    hints, found = get_type_hints(section), {}
    for each in fields(section):
        if each.metadata:
            kind = _kind(hints[each.name])
            nullable = each.default is None and "null" not in kind and kind != "any"
            found[each.name] = Setting(
                each.name, f"{kind}|null" if nullable else kind, each.default, **each.metadata
            )
    return found


def check_section(section: object, kind: type) -> None:
    """Raise UsageError for values that break the rules of their fields; ``kind``: the section's dataclass."""
    settings = settings_of(kind).values()
    check_all(*[(each.check, getattr(section, each.name), kind.__doc__) for each in settings])


def kinds_of(section: type) -> dict[str, str]:
    """The kind of each setting of a section."""
    return {name: each.kind for name, each in settings_of(section).items()}


def defaults_of(section: type) -> dict[str, Any]:
    """The default of each setting of a section."""
    return {name: each.default for name, each in settings_of(section).items()}


class Section:
    """What the dataclasses of sections have in common."""

    @classmethod
    def of(cls, other: object) -> Self:
        """The settings that ``other``, MindFormers' object of the section, has as attributes."""
        names = settings_of(cls)  # type: ignore[arg-type]  # of functools.cache
        return cls(**{name: getattr(other, name) for name in names if hasattr(other, name)})


def _kind(annotation: object) -> str:
    if isinstance(annotation, UnionType):
        return "|".join(dict.fromkeys(map(_kind, get_args(annotation))))
    if get_origin(annotation) is tuple:
        return "wholes"
    return _KINDS[get_origin(annotation) if get_origin(annotation) is dict else annotation]
