"""docs/settings.md from the fields: python -m research.telechat2.config.settings_page > docs/settings.md."""

from collections.abc import Iterator

from research.telechat2.config.fields import settings_of
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.moe import ExpertSection
from research.telechat2.config.plan_settings import (
    ParallelSettings,
    RecomputeSettings,
    RunnerSettings,
    SwapSettings,
)


def page() -> Iterator[str]:
    """The lines of the page: a table for each section."""
    yield "# Settings"
    yield ""
    yield "Written by `python -m research.telechat2.config.settings_page`; correct the fields, not this page."
    for part in reversed(ModelSettings.__bases__):
        yield from _table(f"model.model_config: {part.__doc__}", part)
    for section in (ParallelSettings, RecomputeSettings, SwapSettings, RunnerSettings, ExpertSection):
        yield from _table(str(section.__doc__), section)


def _table(title: str, section: type) -> Iterator[str]:
    yield from ("", f"## {title}", "", "| Key | Default | Value | Meaning |", "| --- | --- | --- | --- |")
    for each in settings_of(section).values():
        value = each.rule() or each.kind.replace("|", " or ")
        default = "null" if each.default is None else each.default
        meaning = each.help or "MindFormers' own; this model has no other value."
        unit = f", {each.unit}" if each.unit else ""
        yield f"| `{each.name}` | `{default}` | {value}{unit} | {meaning} |"


if __name__ == "__main__":
    print("\n".join(page()))
