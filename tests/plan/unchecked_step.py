"""The training step of a YAML with this project's rules switched off: what MindSpore itself would refuse."""

from research.telechat2 import telechat_config
from research.telechat2.config import pipeline
from research.telechat2.parallel import strategies
from research.telechat2.run import training_step


def build(settings: dict):
    """As training_step.build; imported by the compiling process."""
    for module, rule in (
        (telechat_config, "check_fields"),
        (telechat_config, "check_plan"),
        (strategies, "check_cluster"),
        (pipeline, "check_schedule"),
    ):
        assert callable(getattr(module, rule))
        setattr(module, rule, lambda *arguments: None)
    return training_step.build(settings)
