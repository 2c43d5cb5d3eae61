"""Rules of MindSpore's context, which would end a run minutes after its start, some without a message."""

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.kinds import check_bool, check_number
from research.telechat2.config.sections import Settings, section_of

_LEVELS = ("level1", "level2", "level3")


def check_parallel_sections(settings: Settings) -> None:
    """UsageError for copies of rows, and options of pipeline and optimizer that MindSpore does not have."""
    parallel = section_of(settings, "parallel") if settings.get("use_parallel") else {}
    check_all(
        (_check_copies, settings.get("micro_batch_interleave_num")),
        (_check_pipeline, parallel.get("pipeline_config")),
        (_check_optimizer, section_of(parallel, "parallel_optimizer_config")),
    )


def _check_copies(copies: object) -> None:
    if copies not in (None, 1) or copies is True:
        raise UsageError(
            f"micro_batch_interleave_num is {copies!r}, with which MindSpore adds up losses and gradients, "
            "not their mean; set it to 1, and model_config.fine_grain_interleave: 2 to have copies overlap."
        )


def _check_pipeline(section: Settings | None) -> None:
    if section is None:
        return
    for key in ("pipeline_interleave", "pipeline_scheduler"):
        if key not in section:
            raise UsageError(
                f"parallel.pipeline_config is {section}, without {key}; remove the section, or write both "
                "keys: {pipeline_interleave: True, pipeline_scheduler: 1f1b}."
            )
    check_bool("parallel.pipeline_config.pipeline_interleave", section["pipeline_interleave"])


def _check_optimizer(section: Settings) -> None:
    name = "parallel.parallel_optimizer_config"
    level = section.get("optimizer_level", _LEVELS[0])
    if level not in _LEVELS:
        raise UsageError(f"{name}.optimizer_level is {level!r}; it must be one of {', '.join(_LEVELS)}.")
    shard = section.get("gradient_accumulation_shard", False)
    check_bool(f"{name}.gradient_accumulation_shard", shard)
    stated = "optimizer_level" in section and "gradient_accumulation_shard" in section
    if stated and level != "level2":
        raise UsageError(
            f"{name} has optimizer_level {level} and gradient_accumulation_shard {shard}, which goes with "
            "level2 only; remove gradient_accumulation_shard."
        )
    threshold = section.get("parallel_optimizer_threshold", 0)
    check_number(f"{name}.parallel_optimizer_threshold", threshold, whole=True, least=0)
    if (size := section.get("optimizer_weight_shard_size", -1)) != -1:
        check_number(f"{name}.optimizer_weight_shard_size (-1: all devices)", size, whole=True, least=1)
