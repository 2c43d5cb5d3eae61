"""What the config.json beside weights states of the model, by the names of a YAML's settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.telechat2.checkpoint.release.companion_files import GENERATION
from research.telechat2.checkpoint.release.description import (
    EPSILON,
    LENGTHS,
    id_list,
    lengths,
    refuse_unlike_telechat,
    stated_base,
    token_ids,
)
from research.telechat2.checkpoint.release.llama_config import describe_llama, is_llama
from research.telechat2.checkpoint.release.rotary import NONE
from research.telechat2.checkpoint.release.values import Config, number, one_of, whole_number
from research.telechat2.checkpoint.sizes import TelechatSizes, config_beside
from research.telechat2.common.errors import naming
from research.telechat2.common.files import read_json
from research.telechat2.config.classes import TELECHAT_CONFIGS
from research.telechat2.config.release import CHOSEN, Said

_CHOSEN_NAMES = ("num_experts_per_tok", CHOSEN)


def said_of(settings: Mapping[str, Any], checkpoint: object) -> Said | None:
    """What the config.json of ``checkpoint`` states for the model of a YAML, which nothing has checked yet.

    None: there is none, there are no weights, or the model is of another project.

    Raises:
        UsageError: see said_beside.
    """
    model = settings.get("model")
    section = model.get("model_config") if isinstance(model, dict) else None
    stated = section if isinstance(section, dict) else {}
    if not checkpoint or not isinstance(checkpoint, (str, Path)):
        return None
    if stated.get("type", "TelechatConfig") not in TELECHAT_CONFIGS:
        return None
    return said_beside(Path(checkpoint).expanduser(), stated.get("tie_word_embeddings"))


def said_beside(path: Path, tied: bool | None = None) -> Said | None:
    """What the config.json of a checkpoint states; None where there is none.

    ``tied``: whether the output layer is the embedding, where config.json does not say: TeleChat v1 7B's does
    not, and its code has a base length of its own.

    Raises:
        UsageError: it is broken, or gives one number in two ways.
    """
    file = config_beside(path)
    if file is None:
        return None
    config, generation = read_json(file) or {}, read_json(file.parent / GENERATION)
    with naming(file):
        if config.get("tie_word_embeddings") is None and tied is not None:
            config["tie_word_embeddings"] = tied
        values, names = (_of_llama if is_llama(config) else _of_telechat)(config, generation)
        return Said(str(file), values, TelechatSizes.from_hf_config(config).head_dim, names)


def _of_llama(config: Config, generation: Config | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by TelechatConfig's field names, and how the config spells those that are called otherwise."""
    found = describe_llama(config, generation)
    values: dict[str, Any] = {
        "rms_norm_eps": found.rms_norm_eps,
        "theta": found.theta,
        "tie_word_embeddings": found.sizes.tie_word_embeddings,
    }
    if found.extension != NONE:
        values["extend_method"], values["scaling_factor"] = found.extension
    ids = {key: ids for key, ids in found.ids.items() if ids is not None and key != "pad_token_id"}
    return values | ids, {"theta": "the rotary base (rope_theta)", "extend_method": "rope_scaling"}


def _of_telechat(config: Config, generation: Config | None) -> tuple[dict[str, Any], dict[str, str]]:
    """As ``_of_llama``."""
    sizes = TelechatSizes.from_hf_config(config)
    refuse_unlike_telechat(config)
    epsilon, (base, theta) = one_of(config, EPSILON), stated_base(config)
    values = {
        "rms_norm_eps": number(config, epsilon, 0.0) if epsilon else None,
        "theta": theta if base else None,
        "tie_word_embeddings": sizes.tie_word_embeddings,
        CHOSEN: _chosen(config),
    }
    of_release = zip(LENGTHS, lengths(config, sizes), strict=True)
    implied = base is None and "n_layer" in config  # by the code of the release
    values |= {key: value for key, value in of_release if implied or config.get(key) is not None}
    if config.get("extend_method") not in (None, "None", "DYNAMIC_NTK"):
        values |= {key: config.get(key) for key in ("extend_method", "scaling_factor")}
    for key, value in token_ids(config, generation).items():
        ids = id_list(key, value)
        if ids and ids[0] >= 0:
            values[key] = ids[0]  # as the tokenizer of TeleChat has one; generate stops at no others
    values = {key: value for key, value in values.items() if value is not None}
    chosen = {CHOSEN: one_of(config, _CHOSEN_NAMES) or f"moe_config.{CHOSEN}"}
    return values, {"rms_norm_eps": epsilon or "", "theta": base or ""} | chosen


def _chosen(config: Config) -> int | None:
    """Experts that take each token; None where the config does not say."""
    section = config.get("moe_config")
    found = config if one_of(config, _CHOSEN_NAMES) else section if isinstance(section, dict) else {}
    key = one_of(found, _CHOSEN_NAMES)
    return whole_number(found, key, 1) if key else None
