"""Whether the model that is to be trained fits into a CPU's memory."""

from research.telechat2.common.memory import check_host_memory
from research.telechat2.config.settings import DEFAULTS, model_config
from research.telechat2.config.sharing import memory_of_rank, rotary_bytes

_GRADIENT, _MOMENTS = 4, 8  # bytes of a parameter: float32, two of AdamW


def check_training_memory(config: dict, processes: int) -> None:
    """Refuse a model whose weights, gradients and moments alone are more than this machine has.

    Args:
        config: the settings of a training on CPUs, with a TelechatConfig.
        processes: copies of the model on this machine.

    Raises:
        UsageError: with the sizes.
    """
    settings = model_config(config, DEFAULTS["parallel_config"])
    settings.use_past = False
    weights = memory_of_rank(settings, 1)[0]
    parameters = weights / (2 if "16" in str(settings.param_init_type) else 4)
    parts = {
        "weights": weights,
        "gradients": parameters * _GRADIENT,
        "moments": parameters * _MOMENTS,
        "rotary tables": rotary_bytes(settings),
    }
    needed = {name: processes * size for name, size in parts.items()}
    check_host_memory(needed, "seq_length or the model's sizes")
