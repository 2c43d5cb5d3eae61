"""The plan of a prediction: whether it is legal, and what it takes of each device's memory."""

from dataclasses import asdict, dataclass

from research.telechat2.config.generation_limits import GenerationLimits
from research.telechat2.config.sections import Settings, section_of
from research.telechat2.config.settings import DEFAULTS, model_config
from research.telechat2.config.sharing import memory_of_rank, prediction_plan


@dataclass(frozen=True)
class CheckedPrediction:
    """A legal prediction.

    Attributes:
        device_num: devices, and processes, that share the model.
        seq_length: most tokens of prompt and answer together.
        cache_tokens: tokens that the cache holds, of all rows together; 0 without a cache.
        weight_bytes, cache_bytes: on each device.
        limit: ``context.max_device_memory``; None on CPUs.
    """

    device_num: int
    seq_length: int
    cache_tokens: int
    weight_bytes: int
    cache_bytes: int
    limit: str | None

    def as_dict(self) -> dict[str, object]:
        """This prediction for JSON."""
        return asdict(self)

    def table(self) -> str:
        """This prediction for people."""
        of = f", of max_device_memory {self.limit}" if self.limit else ""
        return "\n".join(
            [
                f"devices       {self.device_num:,} that predict with one model",
                f"length        {self.seq_length:,} tokens of prompt and answer together at most",
                f"cache         {self.cache_tokens:,} tokens of all prompts and answers together",
                f"memory        {self.weight_bytes / 1e9:.2f} GB of weights and "
                f"{self.cache_bytes / 1e9:.2f} GB of cache on each device{of}",
            ]
        )


def is_prediction(settings: Settings) -> bool:
    """Whether a YAML is one of a prediction."""
    return str(settings.get("run_mode")).startswith("predict")


def check_prediction(settings: Settings, device_num: int | None = None) -> CheckedPrediction:
    """Check the plan of a prediction.

    Args:
        settings: of ``read_settings``.
        device_num: how many devices there are; None: as many as the YAML says, or one.

    Raises:
        UsageError: a rule is broken, see prediction_plan.
    """
    shared = bool(settings.get("use_parallel"))
    given = section_of(settings, "parallel_config").get("model_parallel") if shared else 1
    devices = device_num or given or 1
    plan = prediction_plan(settings, devices) or {}
    config = model_config(settings, DEFAULTS["parallel_config"] | plan)
    context = section_of(settings, "context")
    on_cpu = context.get("device_target", "Ascend") == "CPU"
    weights, cache = memory_of_rank(config, devices)
    limits = GenerationLimits.of(config, max_length=config.seq_length)
    return CheckedPrediction(
        device_num=devices,
        seq_length=limits.max_length,
        cache_tokens=limits.cache_tokens,
        weight_bytes=weights,
        cache_bytes=cache,
        limit=None if on_cpu else str(context.get("max_device_memory", "58GB")),
    )
