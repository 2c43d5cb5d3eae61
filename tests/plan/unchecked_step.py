"""The training step of a YAML with this project's rules switched off: what MindSpore itself would refuse."""

from research.telechat2 import telechat_config, telechat_parallel, telechat_pipeline
from research.telechat2.plan import training_step


def build(settings: dict):
    """As training_step.build; imported by the compiling process."""
    for module, rule in (
        (telechat_config, "check_fields"),
        (telechat_config, "check_plan"),
        (telechat_parallel, "check_cluster"),
        (telechat_pipeline, "check_schedule"),
    ):
        assert callable(getattr(module, rule))
        setattr(module, rule, lambda *arguments: None)
    return training_step.build(settings)
