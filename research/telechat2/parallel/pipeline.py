"""Put each layer on its pipeline stage."""

import mindspore as ms

from research.telechat2.common.errors import UsageError
from research.telechat2.config.pipeline import check_schedule, partition_of, places


def assign_stages(model, config) -> None:
    """Put each layer of a TelechatForCausalLM on its stage, the embedding on the first, the loss on the last.

    Raises:
        UsageError: MindSpore's context asks for another pipeline than the config.
    """
    stages = config.parallel_config.pipeline_stage
    _check_context(stages, config.pp_interleave_num)
    if stages == 1:
        return
    model.model.tok_embeddings.pipeline_stage = 0
    for layer, place in zip(model.model.layers, places(partition_of(config)), strict=True):
        layer.pipeline_stage = place.stage
    for cell in (model.model.norm_out, model.lm_head, model.loss):
        cell.pipeline_stage = stages - 1


def _check_context(stages: int, chunks: int) -> None:
    running = ms.get_auto_parallel_context("pipeline_stages")
    if running != stages:
        raise UsageError(
            f"parallel_config.pipeline_stage is {stages}, but MindSpore is set up for {running} stages; "
            "set both, pipeline_stage and parallel.pipeline_stages, to one number, or leave the latter out."
        )
    check_schedule(
        chunks,
        ms.get_auto_parallel_context("pipeline_scheduler"),
        ms.get_auto_parallel_context("pipeline_interleave"),
    )
