"""The settings of a run that evaluates: what MindFormers or MindSpore would refuse is set right here."""

from collections.abc import Mapping

from research.telechat2.common.errors import UsageError
from research.telechat2.config.check import kind_of
from research.telechat2.config.optimization import check_run_numbers
from research.telechat2.config.pipeline import partition
from research.telechat2.config.sections import Settings, section_of

METRIC = "TelechatPerplexity"
# MindFormers' metric of the same name in older YAMLs: a mean of batches' means, of logits on the host.
REPLACED_METRICS = ("PerplexityMetric",)


def check_evaluation_settings(config: Settings, changed: Mapping[str, object]) -> list[str]:
    """Take out of ``config`` what an evaluation does not need; a note for each such setting.

    Raises:
        UsageError: the command line, ``changed``, counts training records; a batch or a seed that cannot be.
    """
    if (samples := changed.get("train_dataset.data_loader.num_samples")) is not None:
        raise UsageError(
            f"--num_samples {samples} counts training records, which an evaluation does not read; give "
            f"--eval_dataset.data_loader.num_samples {samples}."
        )
    check_run_numbers(config)
    if config.get("resume_training"):
        config["resume_training"] = False
        return ["resume_training has no effect in an evaluation: the weights alone are read"]
    return []


def prepare_evaluation(config: Settings, *, training: bool) -> None:
    """Fit the settings of a run that evaluates, in place, and print what is changed.

    ``training``: whether it evaluates between steps of training (``do_eval``).

    Raises:
        UsageError: another metric than loss and perplexity, no weights, or a parallel plan that can train but
            not evaluate.
    """
    _fit_metric(config)
    _check_experts(config)
    _fit_stages(config, training)
    if training:
        return
    if not has_weights(config):
        raise UsageError(
            "no weights to evaluate; give --load_checkpoint, a .safetensors or .ckpt file or a directory."
        )
    _fit_compiler(config)
    config["recompute_config"] = {"recompute": False}  # there is no backward pass
    config["model"]["model_config"]["use_past"] = False  # whole sequences, with a predict YAML as well


def has_weights(config: Settings) -> bool:
    """Whether a config names weights, in any of the places where MindFormers looks for them."""
    model = section_of(config, "model.model_config")
    own = any(config.get(key) for key in ("load_checkpoint", "only_save_strategy"))
    return bool(
        own or section_of(config, "checkpoint").get("load_path") or model.get("checkpoint_name_or_path")
    )


def _fit_metric(config: Settings) -> None:
    """Have TelechatPerplexity measure."""
    given = config.get("metric") or {}
    names = [metric.get("type") for metric in (given if isinstance(given, list) else [given])]
    others = [name for name in names if name not in (None, METRIC, *REPLACED_METRICS)]
    if others:
        raise UsageError(
            f"metric is {', '.join(others)}, but evaluation gives loss and perplexity; write metric: {{type: "
            f"{METRIC}}}, or compare answers of run_telechat_predict.py yourself."
        )
    if names != [METRIC]:
        print(f"metric: {METRIC} instead of {names[0] or 'none'}, loss and perplexity by token", flush=True)
    config["metric"] = {"type": METRIC, "auto_register": f"telechat_register.{METRIC}"}


def _check_experts(config: Settings) -> None:
    """Refuse a plan by which the experts cannot answer every token that is sent to them."""
    plan, moe = section_of(config, "parallel_config"), section_of(config, "moe_config")
    mp = plan.get("model_parallel", 1)
    whole = moe.get("ep_extend_tp", True) and plan.get("use_seq_parallel", False)
    if kind_of(config) == "semi_auto" and moe.get("expert_num", 1) > 1 and mp > 1 and not whole:
        raise UsageError(
            f"evaluation drops no token, which takes whole experts on each device, but model_parallel {mp} "
            "splits their width. Set moe_config.ep_extend_tp: True with parallel_config.use_seq_parallel: "
            "True, or model_parallel: 1; without do_eval the plan can train as it is."
        )


def _fit_stages(config: Settings, training: bool) -> None:
    """Evaluate with one run of layers in each stage: MindSpore 2.9 crashes at a forward pass of several."""
    model = section_of(config, "model.model_config")
    stages = section_of(config, "parallel_config").get("pipeline_stage", 1)
    chunks = model.get("pp_interleave_num", 1)
    if kind_of(config) != "semi_auto" or stages == 1 or chunks == 1:
        return
    if training:
        raise UsageError(
            f"do_eval is True and pp_interleave_num {chunks}: MindSpore 2.9 cannot evaluate with virtual "
            "chunks. Set do_eval: False and evaluate a checkpoint (--run_mode eval), or set "
            "pp_interleave_num: 1 and parallel.pipeline_config.pipeline_interleave: False."
        )
    num_layers = model["num_layers"]
    table = partition(num_layers, stages, chunks, model.get("offset", 0))
    counts = [sum(column) for column in zip(*table, strict=True)]
    model |= {"pp_interleave_num": 1, "offset": [count - num_layers // stages for count in counts]}
    config["parallel"] = config["parallel"] | {
        "pipeline_config": {"pipeline_interleave": False, "pipeline_scheduler": "1f1b"}
    }
    print(f"pipeline: evaluated with one run of layers in each stage, {counts}, not {chunks}", flush=True)


def _fit_compiler(config: Settings) -> None:
    """Evaluate with the kernels of training: MindFormers refuses jit_level O1, and adds infer_boost."""
    context = section_of(config, "context")
    if context.get("device_target", "Ascend") == "CPU":
        return
    given = section_of(context, "jit_config")
    level = given.get("jit_level") or context.get("jit_level") or "O0"
    boost = given.get("infer_boost") or context.get("infer_boost", "off")
    if level == "O1":
        print("context.jit_config.jit_level: O0 instead of O1, which cannot evaluate", flush=True)
        level = "O0"
    config["context"] = context | {"jit_config": {"jit_level": level, "infer_boost": boost}}
