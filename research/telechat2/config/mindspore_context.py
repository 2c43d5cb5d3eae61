"""What a YAML's settings around ``parallel_config`` may say: rules of MindSpore's context that need none.

The check of a plan obeys them, and a run before it starts: MindSpore would end it minutes later, some of them
without a message.
"""

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.kinds import check_bool, check_number
from research.telechat2.config.sections import Settings, section_of

_LEVELS = ("level1", "level2", "level3")


def check_parallel_sections(settings: Settings) -> None:
    """Refuse copies of the rows, and options of pipeline and optimizer that MindSpore does not have.

    Args:
        settings: the YAML.

    Raises:
        UsageError: with the values.
    """
    parallel = section_of(settings, "parallel") if settings.get("use_parallel") else {}
    check_all(
        (_check_copies, settings.get("micro_batch_interleave_num")),
        (_check_pipeline, parallel.get("pipeline_config")),
        (_check_optimizer, section_of(parallel, "parallel_optimizer_config")),
    )


def _check_copies(copies: object) -> None:
    if copies in (None, 1) and copies is not True:
        return
    raise UsageError(
        f"micro_batch_interleave_num is {copies!r}; MindSpore's MicroBatchInterleaved adds up the copies' "
        "losses and gradients instead of averaging them, so that a run would not train as with 1. Set it to "
        "1, and model_config.fine_grain_interleave: 2 to have copies of the tokens overlap."
    )


def _check_pipeline(section: Settings | None) -> None:
    if section is None:
        return
    name = "parallel.pipeline_config"
    for key in ("pipeline_interleave", "pipeline_scheduler"):
        if key not in section:
            raise UsageError(
                f"{name} is {section}, without {key}; MindSpore asks for both keys. Add it, as in "
                "{pipeline_interleave: True, pipeline_scheduler: 1f1b}, or leave the section out."
            )
    check_bool(f"{name}.pipeline_interleave", section["pipeline_interleave"])


def _check_optimizer(section: Settings) -> None:
    name = "parallel.parallel_optimizer_config"
    level = section.get("optimizer_level", _LEVELS[0])
    if level not in _LEVELS:
        raise UsageError(f"{name}.optimizer_level is {level!r}; it must be one of {', '.join(_LEVELS)}.")
    if "gradient_accumulation_shard" in section:
        shard = section["gradient_accumulation_shard"]
        check_bool(f"{name}.gradient_accumulation_shard", shard)
        if "optimizer_level" in section and level != "level2":
            raise UsageError(
                f"{name} has optimizer_level {level} and gradient_accumulation_shard {shard}; MindSpore "
                "takes the latter beside level2 only. Remove gradient_accumulation_shard."
            )
    threshold = section.get("parallel_optimizer_threshold", 0)
    check_number(f"{name}.parallel_optimizer_threshold", threshold, whole=True, least=0)
    if (size := section.get("optimizer_weight_shard_size", -1)) != -1:
        check_number(f"{name}.optimizer_weight_shard_size (-1: all devices)", size, whole=True, least=1)
