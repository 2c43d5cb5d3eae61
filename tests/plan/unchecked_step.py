"""The training step of a YAML with this project's rules switched off: what MindSpore itself would refuse."""

from research.telechat2.config import model, pipeline
from research.telechat2.parallel import strategies
from research.telechat2.run import training_step


def build(settings: dict):
    """As training_step.build; imported by the compiling process."""
    for module, rule in (
        (model, "_check_model"),
        (strategies, "check_cluster"),
        (pipeline, "check_schedule"),
    ):
        assert callable(getattr(module, rule))
        setattr(module, rule, lambda *arguments: None)
    return training_step.build(settings)
