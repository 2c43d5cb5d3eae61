"""A run's settings before it starts: a YAML with changes, every key known, read without MindSpore.

MindFormers and MindSpore know these sections' keys and refuse others minutes later, or pass them over. The
tables here are theirs, of the release that pyproject.toml names; a test compares them.
"""

import ast
import inspect
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from research.telechat2 import telechat_parallel_config as rules
from research.telechat2.telechat_config_rules import (
    DTYPE_FIELDS,
    check_fields,
    complete,
    dtype_name,
    library_keys,
)
from research.telechat2.telechat_moe_config import MoESettings, plain_section
from research.telechat2.telechat_run_config import (
    apply_overrides,
    did_you_mean,
    read_config,
    resolve_config,
)
from research.telechat2.telechat_run_keys import TEMPLATE, check_keys

DEFAULTS = {
    "parallel_config": {
        "data_parallel": 1, "model_parallel": 1, "context_parallel": 1, "expert_parallel": 1,
        "pipeline_stage": 1, "micro_batch_num": 1, "seq_split_num": 1, "use_seq_parallel": False,
        "optimizer_shard": None, "gradient_aggregation_group": 4, "vocab_emb_dp": True,
        "context_parallel_algo": "colossalai_cp", "ulysses_degree_in_cp": 1, "mem_coeff": 0.1,
    },
    "recompute_config": {
        "recompute": False, "select_recompute": False, "parallel_optimizer_comm_recompute": False,
        "select_comm_recompute": False, "mp_comm_recompute": True, "recompute_slice_activation": False,
        "select_recompute_exclude": False, "select_comm_recompute_exclude": False,
    },
    "swap_config": {"swap": False, "layer_swap": None, "op_swap": None, "default_prefetch": 1},
    "runner_config": {
        "batch_size": 1, "epochs": 1, "sink_mode": True, "sink_size": 1, "gradient_accumulation_steps": 1,
        "num_classes": 1, "stop_step": 0,
    },
}  # fmt: skip
KEYS = {
    "parallel": (
        "device_num", "global_rank", "gradients_mean", "gradient_fp32_sync", "loss_repeated_mean",
        "pipeline_stages", "auto_pipeline", "pipeline_result_broadcast", "pipeline_segments", "parallel_mode",
        "search_mode", "auto_parallel_search_mode", "parameter_broadcast", "strategy_ckpt_load_file",
        "strategy_ckpt_save_file", "group_ckpt_save_file", "full_batch", "dataset_strategy",
        "enable_parallel_optimizer", "force_fp32_communication", "parallel_optimizer_config",
        "pipeline_config", "grad_accumulation_step", "all_reduce_fusion_config", "communi_parallel_mode",
        "optimizer_weight_shard_size", "optimizer_weight_shard_aggregated_save", "sharding_propagation",
        "enable_alltoall", "strategy_ckpt_config", "comm_fusion", "dump_local_norm", "dump_local_norm_path",
        "dump_device_local_norm", "auto_parallel_new_interface", "init_param_in_compile",
    ),
    "parallel.parallel_optimizer_config": (
        "gradient_accumulation_shard", "parallel_optimizer_threshold", "optimizer_weight_shard_size",
        "optimizer_level",
    ),
    "parallel.pipeline_config": ("pipeline_interleave", "pipeline_scheduler"),
    "model": ("model_config", "arch"),
} | {section: tuple(keys) for section, keys in DEFAULTS.items()}  # fmt: skip
# Of these classes alone are the keys known, which take others and pass them over.
TYPE_KEYS = {
    ("lr_schedule", "CosineWithWarmUpLR"): (
        "learning_rate", "warmup_steps", "total_steps", "num_cycles", "lr_end", "warmup_lr_init",
        "warmup_ratio", "decay_steps", "decay_ratio", "warmup_epochs",
    ),
    ("runner_wrapper", "MFTrainOneStepCell"): (
        "use_clip_grad", "max_grad_norm", "scale_sense", "local_norm",
    ),
}  # fmt: skip


def read_settings(name: str, changes: dict[str, object], cwd: Path) -> tuple[Path, dict]:
    """The file that ``--config name`` means, and its settings with ``changes``, dotted key to value.

    Raises:
        ValueError: no such file, or a key that nothing reads.
    """
    path = resolve_config(name, cwd)
    settings = read_config(path)
    apply_overrides(settings, changes, TEMPLATE)
    check_keys(settings)
    for section, known in KEYS.items():
        _check_section(settings, section, known)
    for (section, kind), known in TYPE_KEYS.items():
        if section_of(settings, section).get("type") == kind:
            _check_section(settings, section, (*known, "type", "auto_register"))
    return path, settings


def section_of(settings: dict, dotted: str) -> dict:
    """The section ``a.b``, empty where there is none.

    Raises:
        ValueError: it is no section.
    """
    found = settings
    for name in dotted.split("."):
        found = found.get(name)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise ValueError(f"`{dotted}` is {found!r}; expected a section of settings.")
    return found


def _check_section(settings: dict, section: str, known: tuple[str, ...]) -> None:
    for key in section_of(settings, section):
        if key not in known:
            raise ValueError(
                f"the setting {section}.{key} is read by nothing; remove or correct it. "
                f"{did_you_mean(str(key), list(known))}"
            )


def with_defaults(settings: dict, section: str) -> dict:
    """A section of DEFAULTS as MindFormers completes it."""
    return DEFAULTS[section] | section_of(settings, section)


def model_config(settings: dict, plan: dict) -> SimpleNamespace:
    """The fields of the TelechatConfig that a run would make, checked by the same rules.

    Args:
        settings: the whole YAML.
        plan: its ``parallel_config``, complete, as the run would have it.

    Raises:
        ValueError: see TelechatConfig.
    """
    given = section_of(settings, "model.model_config")
    values = _model_defaults()
    extra = library_keys({key: value for key, value in given.items() if key not in values}, values)
    values |= {key: value for key, value in given.items() if key in values}
    values["batch_size"] = with_defaults(settings, "runner_config")["batch_size"]
    complete(values)
    for name in DTYPE_FIELDS:
        values[name] = dtype_name(name, values[name])
    config = SimpleNamespace(**(values | extra))
    config.parallel_config = SimpleNamespace(
        **plan,
        recompute=SimpleNamespace(**with_defaults(settings, "recompute_config")),
        swap=SimpleNamespace(**with_defaults(settings, "swap_config")),
    )
    experts = plain_section(section_of(settings, "moe_config"))
    config.moe = MoESettings.read(experts, config.intermediate_size)
    check_fields(config)
    rules.check_plan(config)
    return config


def _model_defaults() -> dict:
    """TelechatConfig's arguments and defaults, from its source: to import it takes ten seconds."""
    source = Path(inspect.getfile(rules)).with_name("telechat_config.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    init = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    names = [argument.arg for argument in init.args.args[1:]]
    sections = ("parallel_config", "moe_config")
    return {
        name: _default(default, tree)
        for name, default in zip(names, init.args.defaults, strict=True)
        if name not in sections
    }


def _default(node: ast.expr, tree: ast.Module):
    """A default's value: written there, or a constant that the source imports from a module of rules."""
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    module = next(
        statement.module
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom) and node.id in [name.name for name in statement.names]
    )
    return getattr(import_module(module), node.id)
