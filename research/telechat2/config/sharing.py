"""Who predicts: one process, or several that share the model; known and checked before MindSpore starts."""

import os
import re

from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError
from research.telechat2.common.memory import check_host_memory
from research.telechat2.config.kernel_limits import check_cpu_dtypes, check_paged_kernels
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.sections import Settings, section_of
from research.telechat2.config.settings import DEFAULTS, model_config

PARALLEL_MODEL = "ParallelTelechatForCausalLM"
_UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}


def processes_of_run() -> int:
    """How many processes scripts/msrun_launcher.sh has started, this one included."""
    return int(os.environ["MS_WORKER_NUM"]) if "MS_ROLE" in os.environ else 1


def prediction_plan(settings: Settings, processes: int | None) -> Settings | None:
    """The ``parallel_config`` of processes that share the model; None where one process has it alone.

    Args:
        settings: a predict YAML. Without ``use_parallel`` its ``parallel_config`` means nothing, as in
            MindFormers; without ``model_parallel`` there, all processes take part.
        processes: see ``processes_of_run``; None: as many as the YAML says, or one.

    Raises:
        UsageError: another number of processes runs, or they cannot share this model: sizes that do not
            divide, no cache, other kinds of parallelism, dtypes that the target's kernels do not have, or too
            little memory for each.
    """
    section = section_of(settings, "parallel_config")
    given = section.get("model_parallel") if settings.get("use_parallel") else 1
    shared: int = (processes or 1) if given is None else given
    if processes not in (None, shared):
        raise UsageError(_other_number(settings, shared, processes))
    if (copies := section.get("data_parallel", 1)) != 1 and shared > 1:
        raise UsageError(
            f"parallel_config.data_parallel is {copies}, but processes that predict share one model, by "
            "model_parallel. Set it to 1."
        )
    plan = {"vocab_emb_dp": False} | section | {"model_parallel": shared} if shared > 1 else {}
    config = model_config(settings, DEFAULTS["parallel_config"] | plan)
    if settings.get("use_parallel") and not config.use_past:
        raise UsageError("use_past is False, but processes that share a model predict with a cache; set it.")
    context = section_of(settings, "context")
    on_cpu = context.get("device_target", "Ascend") == "CPU"
    if on_cpu:
        check_cpu_dtypes(config)
    elif config.use_past:
        check_paged_kernels(config)
    if not on_cpu:
        check_memory(config, shared, context.get("max_device_memory", "58GB"))
    else:
        weights, cache = (shared * size for size in memory_of_rank(config, shared))
        parts = {"weights": weights, "the cache": cache, "rotary tables": shared * rotary_bytes(config)}
        check_host_memory(parts, "num_blocks, seq_length or the model's sizes")
    return plan if settings.get("use_parallel") else None


def _other_number(settings: Settings, shared: int, processes: int) -> str:
    if not settings.get("use_parallel"):
        return (
            f"use_parallel is False, but {processes} processes run, each of which would answer by itself; "
            "give --use_parallel True, or start the command without scripts/msrun_launcher.sh."
        )
    return (
        f"parallel_config.model_parallel is {shared}, but this run has {processes} "
        f"{'process' if processes == 1 else 'processes'}. Start {shared}: bash scripts/msrun_launcher.sh "
        f'"python … --use_parallel True" {shared}; or set model_parallel: {processes} in the YAML.'
    )


def check_memory(config: ModelSettings, ranks: int, limit: str) -> None:
    """Refuse what cannot fit: weights and cache alone are more than the process may take of an NPU.

    Args:
        config: TelechatConfig, or its fields.
        ranks: processes that share the model.
        limit: ``context.max_device_memory``, as "58GB".

    Raises:
        UsageError: with the sizes.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)", str(limit))
    if found is None:
        raise UsageError(f"context.max_device_memory is {limit!r}; expected a size such as 58GB.")
    allowed = float(found[1]) * _UNITS[found[2]]
    weights, cache = memory_of_rank(config, ranks)
    if weights + cache > allowed:
        raise UsageError(
            f"each process needs {weights / 1e9:.1f} GB for its weights and {cache / 1e9:.1f} GB for its "
            f"part of a cache of {config.num_blocks * config.block_size} tokens, and more to compute, but "
            f"context.max_device_memory is {limit}. Share the model by more than {ranks} "
            f"{'process' if ranks == 1 else 'processes'} (use_parallel, model_parallel), or lower num_blocks."
        )


def memory_of_rank(config: ModelSettings, ranks: int) -> tuple[int, int]:
    """Bytes of one rank's weights, and of its cache of keys and values."""
    hidden, width, layers = config.hidden_size, config.intermediate_size, config.num_layers
    keys = config.n_kv_heads * (hidden // config.num_heads)
    experts = config.moe.num_experts if config.moe else 1
    router = experts * hidden if config.moe else 0
    shared = layers * (2 * hidden * (hidden + keys) + experts * 3 * width * hidden)
    shared += config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    whole = layers * (hidden + experts * hidden + router + 2 * hidden) + hidden
    weights = (shared // ranks + whole) * _width(config.param_init_type)
    cache = layers * 2 * keys // ranks * config.num_blocks * config.block_size * _width(config.compute_dtype)
    return weights, cache if config.use_past else 0


def rotary_bytes(config: ModelSettings) -> int:
    """The tables of cosines and sines, float32, one row a position."""
    return 2 * 4 * config.seq_length * (config.hidden_size // config.num_heads)


def _width(dtype: object) -> int:
    return WIDTH[str(dtype).lower()]
