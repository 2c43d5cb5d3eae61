"""The sections of a YAML that a model needs, with their defaults, and the model that they describe."""

from research.telechat2.config.fields import defaults_of
from research.telechat2.config.model import read_model
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.moe import ExpertSection
from research.telechat2.config.plan_settings import (
    ParallelSettings,
    RecomputeSettings,
    RunnerSettings,
    SwapSettings,
)
from research.telechat2.config.sections import Settings, section_of

DEFAULTS = {
    "parallel_config": defaults_of(ParallelSettings),
    "recompute_config": defaults_of(RecomputeSettings),
    "swap_config": defaults_of(SwapSettings),
    "runner_config": defaults_of(RunnerSettings),
}


def with_defaults(settings: Settings, section: str) -> Settings:
    """A section of DEFAULTS as MindFormers completes it."""
    return DEFAULTS[section] | section_of(settings, section)


def model_config(settings: Settings, plan: Settings) -> ModelSettings:
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
