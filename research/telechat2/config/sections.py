"""The sections of a YAML by their dotted names."""

from collections.abc import Iterator
from typing import Any

from research.telechat2.common.errors import UsageError

Settings = dict[str, Any]  # of a YAML, or of one of its sections


def section_of(settings: Settings, dotted: str) -> Settings:
    """The section ``a.b``, empty where there is none.

    Raises:
        UsageError: it is no section.
    """
    found = settings
    for name in dotted.split("."):
        inner = found.get(name)
        if inner is None:
            return {}
        if not isinstance(inner, dict):
            raise UsageError(f"`{dotted}` is {inner!r}; expected a section of settings.")
        found = inner
    return found


def sections_at(settings: Settings, path: str) -> Iterator[tuple[str, Settings]]:
    """The sections at ``a.b`` or ``a.b[]``, each with the name that a message gives it; none that is absent.

    What is no section is passed over: its own key's kind is checked where that stands.
    """
    found = [("", settings)]
    for name in path.split(".") if path else ():
        inner = []
        for place, section in found:
            value = section.get(name.removesuffix("[]"))
            at = f"{place}.{name}".lstrip(".")
            if name.endswith("[]"):
                items = value if isinstance(value, list) else []
                inner += [(f"{at[:-2]}[{i}]", item) for i, item in enumerate(items) if isinstance(item, dict)]
            elif isinstance(value, dict):
                inner.append((at, value))
        found = inner
    yield from found
