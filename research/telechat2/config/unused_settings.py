"""Settings that are read and change nothing, because others decide: notes of the check, not errors."""

from collections.abc import Iterator

from research.telechat2.config.sections import Settings, section_of
from research.telechat2.config.settings import with_defaults

# Top-level keys of older YAMLs.
_NEVER = {
    "layer_decay": "it belongs to layer_scale, which MindFormers 1.9 does not have",
    "lr_scale_factor": "it belongs to lr_scale, which is not set",
}


def without_effect(settings: Settings, kind: str) -> Iterator[str]:
    """A message for each setting without effect.

    Args:
        settings: the YAML.
        kind: of the CheckedPlan.
    """
    for key, reason in _NEVER.items():
        if key in settings and not (key == "lr_scale_factor" and settings.get("lr_scale")):
            yield f"{key} has no effect: {reason}."
    given = section_of(settings, "parallel_config")
    if kind != "semi_auto":
        changed = [name for name in given if name != "gradient_aggregation_group"]
        if changed:
            reason = "use_parallel is False" if kind == "single" else "parallel.parallel_mode is 0"
            yield f"parallel_config ({', '.join(changed)}) has no effect: {reason}."
        return
    if given.get("context_parallel", 1) == 1:
        for name in ("context_parallel_algo", "ulysses_degree_in_cp"):
            if name in given:
                yield f"parallel_config.{name} has no effect: context_parallel is 1, so sequences are whole."
    yield from _of_stages(settings, given)
    yield from _of_recompute(settings)
    yield from _of_optimizer(settings)


def _of_stages(settings: Settings, given: Settings) -> Iterator[str]:
    stages = with_defaults(settings, "parallel_config")["pipeline_stage"]
    if stages == 1:
        if given.get("micro_batch_num", 1) > 1:
            yield (
                f"parallel_config.micro_batch_num {given['micro_batch_num']} has no effect: pipeline_stage "
                "is 1. Gradients are accumulated by runner_config.gradient_accumulation_steps."
            )
        return
    if given.get("vocab_emb_dp"):
        yield (
            "parallel_config.vocab_emb_dp True has no effect: MindFormers sets it to False in a pipeline, so "
            "embedding and output projection are split by vocabulary."
        )
    if "gradient_aggregation_group" in given:
        yield (
            "parallel_config.gradient_aggregation_group has no effect: in a pipeline, a stage's gradients "
            "are aggregated together."
        )


def _of_recompute(settings: Settings) -> Iterator[str]:
    recompute = section_of(settings, "recompute_config")
    whole = recompute.get("recompute", False)
    if whole is False or (isinstance(whole, list) and not any(map(bool, whole))):
        for name in ("recompute_slice_activation", "mp_comm_recompute"):
            if name in recompute:
                yield f"recompute_config.{name} has no effect: no layer is recomputed as a whole."


def _of_optimizer(settings: Settings) -> Iterator[str]:
    parallel = section_of(settings, "parallel")
    if parallel.get("parallel_optimizer_config") and not parallel.get("enable_parallel_optimizer"):
        yield (
            "parallel.parallel_optimizer_config has no effect: parallel.enable_parallel_optimizer is not set."
        )
