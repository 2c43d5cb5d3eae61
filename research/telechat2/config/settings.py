"""A run's settings before it starts: a YAML with changes, every key known, read without MindSpore.

The defaults here are MindFormers', of the release that pyproject.toml names; a test compares them.
"""

from collections.abc import Callable
from pathlib import Path

from research.telechat2.config.fields import defaults_of
from research.telechat2.config.model import read_model
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.moe import ExpertSection
from research.telechat2.config.overrides import apply_overrides
from research.telechat2.config.plan_settings import (
    ParallelSettings,
    RecomputeSettings,
    RunnerSettings,
    SwapSettings,
)
from research.telechat2.config.preflight import check_settings
from research.telechat2.config.sections import section_of
from research.telechat2.config.yaml_files import read_config, resolve_config

DEFAULTS = {
    "parallel_config": defaults_of(ParallelSettings),
    "recompute_config": defaults_of(RecomputeSettings),
    "swap_config": defaults_of(SwapSettings),
    "runner_config": defaults_of(RunnerSettings),
}


def read_settings(name: str, changes: dict[str, object], cwd: Path) -> tuple[Path, dict]:
    """The file that ``--config name`` means, and its settings with ``changes``, dotted key to value.

    Raises:
        UsageError: no such file, or see check_settings.
    """
    return read_with_notes(name, changes, cwd)[:2]


def read_with_notes(
    name: str, changes: dict[str, object], cwd: Path, plan: Callable[[dict], object] | None = None
) -> tuple[Path, dict, list[str]]:
    """``read_settings``, and a note for each setting that has no effect and was left out.

    ``plan``: see check_settings.
    """
    path = resolve_config(name, cwd)
    settings = read_config(path)
    apply_overrides(settings, changes)
    notes = check_settings(settings, source=path, plan=plan)
    return path, settings, notes


def with_defaults(settings: dict, section: str) -> dict:
    """A section of DEFAULTS as MindFormers completes it."""
    return DEFAULTS[section] | section_of(settings, section)


def model_config(settings: dict, plan: dict) -> ModelSettings:
    """The model that a run would make, checked by the same rules.

    Args:
        settings: the whole YAML.
        plan: its ``parallel_config``, as the run would have it.

    Raises:
        UsageError: see read_model.
    """
    sections = ParallelSettings(
        **plan,
        recompute=RecomputeSettings(**section_of(settings, "recompute_config")),
        swap=SwapSettings(**section_of(settings, "swap_config")),
    )
    rows = {"batch_size": with_defaults(settings, "runner_config")["batch_size"]}
    experts = ExpertSection(**section_of(settings, "moe_config"))
    return read_model(section_of(settings, "model.model_config") | rows, sections, experts)[0]
