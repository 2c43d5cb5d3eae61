"""TelechatConfig: ModelSettings, whose fields docs/settings.md lists, as MindFormers' configuration."""

from typing import Any

import mindspore as ms

from research.telechat2.compat.library import (
    MindFormerModuleType,
    MindFormerRegister,
    PretrainedConfig,
    default_transformer_config,
    moe_config_from,
    parallel_config_from,
)
from research.telechat2.config.model import read_model
from research.telechat2.config.model_settings import DTYPE_FIELDS, ModelSettings
from research.telechat2.config.moe import ExpertSection
from research.telechat2.config.plan_settings import ParallelSettings, RecomputeSettings, SwapSettings


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class TelechatConfig(PretrainedConfig, ModelSettings):
    """Sizes, dtypes and decoding defaults of a TeleChat2 model; dtypes are MindSpore's.

    Args:
        parallel_config, moe_config: sections of a YAML, or the objects that MindFormers makes of them.
        fields: of ModelSettings, and the keys that MindFormers adds.

    Raises:
        UsageError: see read_model.
    """

    model_type = "telechat"

    def __init__(self, parallel_config: Any = default_transformer_config, moe_config: Any = None, **fields):
        plan, experts = parallel_config_from(parallel_config), moe_config_from(moe_config)
        settings, others = read_model(fields, _plain(plan), ExpertSection.of(experts))
        super().__init__(**others)
        self.__dict__.update(vars(settings) | {"parallel_config": plan, "moe_config": experts})
        for name in DTYPE_FIELDS:
            setattr(self, name, getattr(ms, getattr(settings, name)))

    def to_dict(self) -> dict:
        """MindFormers' dictionary of all fields; ``moe`` follows from them."""
        return {name: value for name, value in super().to_dict().items() if name != "moe"}


def _plain(plan: Any) -> ParallelSettings:
    """MindFormers' object of ``parallel_config`` as its settings."""
    settings = ParallelSettings.of(plan)
    settings.recompute = RecomputeSettings.of(plan.recompute)
    settings.swap = SwapSettings.of(plan.swap)
    settings.context_parallel_algo = plan.context_parallel_algo.value
    return settings
