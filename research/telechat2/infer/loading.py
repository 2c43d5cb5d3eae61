"""What the prediction scripts share: loading a model, and asking it for the next answer."""

import os
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.config.generation_limits import GenerationLimits
from research.telechat2.config.optimization import check_seed
from research.telechat2.config.overrides import did_you_mean
from research.telechat2.config.sampling import SAMPLING, check_sampling
from research.telechat2.config.sections import section_of
from research.telechat2.config.sharing import PARALLEL_MODEL, processes_of_run
from research.telechat2.infer.predictor import Predictor
from research.telechat2.infer.process_group import Group
from research.telechat2.infer.sources import check_weights, open_tokenizer, read_sources
from research.telechat2.text import prompt_format as prompt_formats

GENERATION = (*SAMPLING, "max_new_tokens", "min_length", "min_new_tokens")


def load_predictor(
    yaml_file: str | Path,
    vocab_file: str | Path | None = None,
    checkpoint: str | Path | None = None,
    *,
    prompt_format: str | None = None,
    max_length: int | None = None,
    device_id: int | None = None,
    batch_size: int = 1,
    use_past: bool | None = None,
    use_parallel: bool | None = None,
    generation: dict | None = None,
    seed: int | None = None,
) -> Predictor:
    """Build the model of a predict YAML, which gives the defaults, and load its weights, all or none.

    Args:
        yaml_file: see infer.sources.read_sources, as the next two.
        vocab_file: tokenizer.model; if the YAML names none either, that beside the weights.
        checkpoint: an HF folder, a converted checkpoint, or the `checkpoint` folder of a training run.
        prompt_format: "chat", "plain" or "v1"; by default the one recorded with the checkpoint, else that of
            the release whose vocabulary it is.
        max_length: most tokens of prompt and answer together, at most ``seq_length``; by default that if
            ``generation`` has ``max_new_tokens``, else the YAML's ``max_decode_length``.
        device_id: which NPU.
        batch_size: most prompts at once.
        use_past: predict with a cache.
        use_parallel: share the model with the other processes that scripts/msrun_launcher.sh has started.
        generation: arguments of ``generate``, of GENERATION.
        seed: of sampling.

    Raises:
        UsageError: a file is missing or does not fit the others, or an argument is none.
    """
    generation = generation or {}
    _check_generation(generation)
    check_seed(seed)
    if prompt_format is not None:
        prompt_formats.check(prompt_format)
    if max_length is not None and max_length < 1:
        raise UsageError(f"max_length is {max_length}; it must be at least 1.")
    asked = {"model.model_config.use_past": use_past, "use_parallel": use_parallel}
    changes = {key: value for key, value in asked.items() if value is not None}
    sources = read_sources(yaml_file, checkpoint, vocab_file, processes_of_run(), changes)
    config, plan = sources.config, sources.shared
    settings = config["model"]["model_config"] | {"batch_size": batch_size}
    settings["moe_config"] = section_of(config, "moe_config")
    if plan:
        settings["parallel_config"] = plan
    _set_context(section_of(config, "context"), device_id)
    from research.telechat2.telechat_config import TelechatConfig

    model_config = TelechatConfig(**settings)
    tokenizer, prompt_format = open_tokenizer(sources, model_config, prompt_format)
    given = {name: value for name, value in generation.items() if value is not None}
    limits = GenerationLimits.of(model_config, max_length, given.pop("max_new_tokens", None))
    if processes_of_run() > 1:
        from research.telechat2.compat.library import join_processes

        # what is wrong is found first: the others would wait for a process that ends
        check_weights(sources.checkpoint, model_config, model_config.parallel_config.model_parallel)
        join_processes()
    parallel = plan is not None or section_of(config, "model.arch").get("type") == PARALLEL_MODEL
    model = _build_model(model_config, parallel)
    load_weights(model, sources.checkpoint)
    group = Group(model.ranks if parallel else None)
    seed = config.get("seed") if seed is None else seed
    if seed is not None or plan:
        from mindspore import set_seed

        set_seed(group.seed if seed is None else seed)
    return Predictor(model, tokenizer, prompt_format, limits, given, group, str(sources.checkpoint))


def _check_generation(given: dict) -> None:
    for name in given:
        if name not in GENERATION:
            raise UsageError(f"{name} is no setting of an answer. {did_you_mean(name, list(GENERATION))}")
    check_sampling(given)
    if (tokens := given.get("max_new_tokens")) is not None and tokens < 1:
        raise UsageError(f"max_new_tokens is {tokens}; it must be at least 1.")


def _build_model(config, parallel: bool):
    """The model, or this process's part of it, without weights."""
    from mindspore.nn.utils import no_init_parameters

    from research.telechat2.infer.telechat import ParallelTelechatForCausalLM
    from research.telechat2.telechat import TelechatForCausalLM

    with no_init_parameters():
        model = (ParallelTelechatForCausalLM if parallel else TelechatForCausalLM)(config)
    return model.set_train(False)


def _set_context(context: dict, device_id: int | None) -> None:
    """Choose target, device and graph compiler as MindFormers does for a prediction."""
    import mindspore as ms

    from research.telechat2.compat.library import naming_target

    target = context.get("device_target", "Ascend")
    if processes_of_run() > 1:
        device_id = int(os.environ.get("DEVICE_ID", 0))  # msrun numbers the workers of a machine
    elif device_id is None:
        device_id = context.get("device_id", 0)
    jit = {"jit_level": context.get("jit_level", "O0"), "infer_boost": context.get("infer_boost", "on")}
    jit |= {name: value for name, value in (context.get("jit_config") or {}).items() if value}
    if jit["jit_level"] == "O1":
        raise UsageError("context.jit_config.jit_level is O1, which prediction does not support; use O0.")
    with naming_target(target):
        ms.set_context(mode=ms.GRAPH_MODE, device_target=target, device_id=device_id, jit_config=jit)
    if target == "Ascend":
        ms.set_context(max_device_memory=context.get("max_device_memory", "58GB"))


def load_weights(model, checkpoint: str | Path) -> None:
    """Load every weight of ``model`` from a checkpoint of any layout, one in memory at a time.

    Names and shapes are compared before the first is loaded. A process that shares the model reads its part.
    """
    if hasattr(model, "load_weights"):
        model.load_weights(checkpoint)
        return
    from research.telechat2.checkpoint.layouts.read import whole_weights
    from research.telechat2.checkpoint.loading import load_tensors
    from research.telechat2.checkpoint.sizes import sizes_of_model

    _, tensors = whole_weights(checkpoint, sizes_of_model(model.config))
    load_tensors(model, tensors, str(checkpoint))
