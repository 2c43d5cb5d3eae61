"""Sections of a YAML that other files than the check of its keys ask for."""

from research.telechat2.common.errors import UsageError
from research.telechat2.config.tables import SECTIONS

_TOP = SECTIONS[""]
# MindFormers' own sections, of ``apply_overrides``: a section may be made by an override, also one inside.
TEMPLATE = {key: {} for key, kind in _TOP.items() if kind.startswith("section")} | {"": dict.fromkeys(_TOP)}
TEMPLATE |= {path: {} for path in SECTIONS if "." in path and "_dataset" not in path}


def moe_section(config: dict) -> dict:
    """The section ``moe_config`` of a YAML, empty for a dense model.

    Raises:
        UsageError: it is no section, or holds a key that nothing reads.
    """
    settings = config.get("moe_config") or {}
    if not isinstance(settings, dict):
        raise UsageError(f"`moe_config` is {settings!r}; expected a section of settings.")
    for key in settings:
        if key not in SECTIONS["moe_config"]:
            raise UsageError(f"the setting moe_config.{key} is read by nothing; remove or correct it.")
    return settings
