"""What the config.json beside weights states of the model, in TelechatConfig's terms; and one of our own."""

from pathlib import Path

from research.telechat2.checkpoint.llama.companion_files import GENERATION
from research.telechat2.checkpoint.llama.config import describe_llama, is_llama
from research.telechat2.checkpoint.llama.config_values import number, one_of, whole_number
from research.telechat2.checkpoint.llama.description import (
    BASE_SEQLEN_V1_7B,
    EPSILON,
    SEQ_LENGTH,
    refuse_unlike_telechat,
    stated_base,
    token_ids,
)
from research.telechat2.checkpoint.llama.rotary import NONE
from research.telechat2.checkpoint.sizes import TelechatSizes, config_beside
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import read_json
from research.telechat2.config.classes import TELECHAT_CONFIGS
from research.telechat2.config.release import CHOSEN, Said, settle_model

_CHOSEN_NAMES = ("num_experts_per_tok", CHOSEN)


def settle_with(
    model_config: dict, checkpoint: str | Path | None, where: str, experts: dict | None = None
) -> list[str]:
    """Complete ``model_config``, in place, by what the config.json of ``checkpoint`` says; see settle_model.

    Raises:
        UsageError: config.json is broken, or states another value than ``model_config``.
    """
    settings = {"model": {"model_config": model_config}, "moe_config": experts}
    return settle_model(settings, said_of(settings, checkpoint), where) if checkpoint else []


def said_of(settings: dict, checkpoint: object) -> Said | None:
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
    config, generation = read_json(file), read_json(file.parent / GENERATION)
    try:
        if config.get("tie_word_embeddings") is None and tied is not None:
            config["tie_word_embeddings"] = tied
        values, names = (_of_llama if is_llama(config) else _of_telechat)(config, generation)
        sizes = TelechatSizes.from_hf_config(config)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return Said(str(file), values, sizes.hidden_size // sizes.num_heads, names)


def _of_llama(config: dict, generation: dict | None) -> tuple[dict, dict]:
    found = describe_llama(config, generation)
    values = {
        "rms_norm_eps": found.rms_norm_eps,
        "theta": found.theta,
        "tie_word_embeddings": found.sizes.tie_word_embeddings,
    }
    if found.extension != NONE:
        values |= dict(zip(("extend_method", "scaling_factor"), found.extension, strict=True))
    ids = {key: ids for key, ids in found.ids.items() if ids is not None and key != "pad_token_id"}
    return values | ids, {"theta": "the rotary base (rope_theta)", "extend_method": "rope_scaling"}


def _of_telechat(config: dict, generation: dict | None) -> tuple[dict, dict]:
    sizes = TelechatSizes.from_hf_config(config)
    refuse_unlike_telechat(config)
    epsilon, (base, theta) = one_of(config, EPSILON), stated_base(config)
    values = {
        "rms_norm_eps": number(config, epsilon, 0.0) if epsilon else None,
        "theta": theta if base else None,
        "tie_word_embeddings": sizes.tie_word_embeddings,
        CHOSEN: _chosen(config),
        **_lengths(config, sizes, stated=base is None and "n_layer" in config),
    }
    if config.get("extend_method") not in (None, "None", "DYNAMIC_NTK"):
        values |= {key: config.get(key) for key in ("extend_method", "scaling_factor")}
    for key, ids in token_ids(config, generation).items():
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(each) is int for each in listed):
            raise UsageError(f"the config says {key} = {ids!r}; expected the id of a token, or a list of ids")
        if listed and listed[0] >= 0:
            values[key] = listed[0]  # as the tokenizer of TeleChat has one; generate stops at no others
    values = {key: value for key, value in values.items() if value is not None}
    chosen = {CHOSEN: one_of(config, _CHOSEN_NAMES) or f"moe_config.{CHOSEN}"}
    return values, {"rms_norm_eps": epsilon or "", "theta": base or ""} | chosen


def _chosen(config: dict) -> int | None:
    """Experts that take each token; None where the config does not say."""
    section = config.get("moe_config")
    found = config if one_of(config, _CHOSEN_NAMES) else section if isinstance(section, dict) else {}
    key = one_of(found, _CHOSEN_NAMES)
    return whole_number(found, key, 1) if key else None


def _lengths(config: dict, sizes: TelechatSizes, stated: bool) -> dict:
    """``base_seqlen`` and ``training_seqlen``; of a release's config also those that its code implies."""
    if not stated:
        return {
            key: whole_number(config, key, 0)
            for key in ("base_seqlen", "training_seqlen")
            if config.get(key) is not None
        }
    trained = whole_number(config, "training_seqlen", whole_number(config, "seq_length", SEQ_LENGTH))
    silent = BASE_SEQLEN_V1_7B if sizes.tie_word_embeddings else SEQ_LENGTH
    return {"base_seqlen": whole_number(config, "base_seqlen", silent), "training_seqlen": trained}
