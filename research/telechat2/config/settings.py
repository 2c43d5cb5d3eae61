"""A run's settings before it starts: a YAML with changes, every key known, read without MindSpore.

The defaults here are MindFormers', of the release that pyproject.toml names; a test compares them.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from research.telechat2.common.errors import UsageError
from research.telechat2.config import parallel as rules
from research.telechat2.config.keys import TEMPLATE
from research.telechat2.config.model import DTYPE_FIELDS, check_fields, complete, dtype_name, library_keys
from research.telechat2.config.model_fields import model_defaults
from research.telechat2.config.moe import MoESettings, plain_section
from research.telechat2.config.overrides import apply_overrides
from research.telechat2.config.preflight import check_settings
from research.telechat2.config.yaml_files import read_config, resolve_config

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


def read_settings(name: str, changes: dict[str, object], cwd: Path) -> tuple[Path, dict]:
    """The file that ``--config name`` means, and its settings with ``changes``, dotted key to value.

    Raises:
        UsageError: no such file, or see check_settings.
    """
    return read_with_notes(name, changes, cwd)[:2]


def read_with_notes(
    name: str, changes: dict[str, object], cwd: Path, plan: Callable[[dict], object] | None = None
) -> tuple[Path, dict, list[str]]:
    """``read_settings``, and a note for each setting that has no effect and was left out.

    ``plan``: see check_settings.
    """
    path = resolve_config(name, cwd)
    settings = read_config(path)
    apply_overrides(settings, changes, TEMPLATE)
    notes = check_settings(settings, source=path, plan=plan)
    return path, settings, notes


def section_of(settings: dict, dotted: str) -> dict:
    """The section ``a.b``, empty where there is none.

    Raises:
        UsageError: it is no section.
    """
    found = settings
    for name in dotted.split("."):
        found = found.get(name)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise UsageError(f"`{dotted}` is {found!r}; expected a section of settings.")
    return found


def with_defaults(settings: dict, section: str) -> dict:
    """A section of DEFAULTS as MindFormers completes it."""
    return DEFAULTS[section] | section_of(settings, section)


def model_config(settings: dict, plan: dict) -> SimpleNamespace:
    """The fields of the TelechatConfig that a run would make, checked by the same rules.

    Args:
        settings: the whole YAML.
        plan: its ``parallel_config``, complete, as the run would have it.

    Raises:
        UsageError: see TelechatConfig.
    """
    given = section_of(settings, "model.model_config")
    values = model_defaults()
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
    check_fields(config, (rules.check_plan, config))
    return config
