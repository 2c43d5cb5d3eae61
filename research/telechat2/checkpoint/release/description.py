"""What a model's config says beside its sizes: of TeleChat2, of TeleChat v1, of Llama, or a YAML.

A conversion carries config.json along unchanged, so the file beside MindSpore weights tells what they are a
model of. This reads it, in each spelling, into the terms of TelechatConfig.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from research.telechat2.checkpoint.release.rotary import NONE, Extension, kind_of, rope_section
from research.telechat2.checkpoint.release.values import Config, number, one_of, whole_number
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.common.errors import UsageError
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.rope import base_of_release, stretch_factor, stretched_base, yarn_settings

FAMILY_THETA = 10000.0  # rotary base of every TeleChat model within its base length
SEQ_LENGTH = 8192  # where a TeleChat config is silent
BASE_SEQLEN_V1_7B = 4096  # written into the code of TeleChat v1 7B, not into its config; 12B's is 8192
EPSILON = ("layer_norm_epsilon", "rms_norm_eps")
BASE = ("theta", "rope_theta")
LENGTHS = ("base_seqlen", "training_seqlen")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Description:
    """A model in the terms of TelechatConfig.

    ``seq_length``: up to which ``theta`` and ``extension`` hold. ``ids``: bos, eos and padding, None where
    unknown. ``attention_bias``, ``mlp_bias``: whether the torch form has biases; that of a TeleChat model
    always has, on wo and w2. ``grows``: whether the torch code stretches the base for longer texts.
    """

    origin: Literal["telechat", "telechat v1", "llama"]
    sizes: TelechatSizes
    rms_norm_eps: float
    theta: float
    seq_length: int
    ids: dict[str, Any]
    extension: Extension = NONE
    attention_bias: bool = True
    mlp_bias: bool = True
    grows: bool = True


def token_ids(config: Config, generation: Config | None) -> dict[str, Any]:
    """bos, eos and padding: those of generation_config.json where it has them.

    TeleChat v1 7B's config.json names ids that its vocabulary uses otherwise.
    """
    own = {key: value for key, value in (generation or {}).items() if value is not None}
    return {key: own.get(key, config.get(key)) for key in IDS}


def id_list(key: str, value: object) -> list[int]:
    """What ``token_ids`` found for a key as a list of none, one or several; UsageError for other values."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    ids = [each for each in given if type(each) is int]
    if len(ids) != len(given):
        raise UsageError(f"the config says {key} = {value!r}; expected the id of a token, or a list of ids")
    return ids


def lengths(config: Config, sizes: TelechatSizes) -> tuple[int, int]:
    """``base_seqlen`` and ``training_seqlen`` of a TeleChat config.json, or as its code implies."""
    trained = whole_number(config, "training_seqlen", whole_number(config, "seq_length", SEQ_LENGTH))
    silent = BASE_SEQLEN_V1_7B if sizes.tie_word_embeddings else SEQ_LENGTH
    return whole_number(config, "base_seqlen", silent), trained


def refuse_activation(config: Config) -> None:
    """UsageError if a config.json names another activation than SwiGLU's."""
    if config.get("hidden_act") not in (None, "silu", "swish"):
        raise UsageError(
            f"the config says hidden_act = {config['hidden_act']!r}, but TeleChat's feed-forward blocks are "
            "SwiGLU throughout: this model cannot be expressed"
        )


def refuse_unlike_telechat(config: Config) -> None:
    """UsageError if a TeleChat config.json asks for what no TeleChat model here has, and no tensor shows."""
    for key in ("embed_layernorm", "apply_residual_connection_post_layernorm"):
        if config.get(key):
            raise UsageError(f"the config says {key} = {config[key]!r}, which no released TeleChat model has")
    if config.get("norm_topk_prob") is False:
        raise UsageError(
            "the config says norm_topk_prob = False, but TeleChat's router divides the probabilities of the "
            "chosen experts by their sum"
        )
    refuse_activation(config)


def stated_base(config: Config) -> tuple[str | None, float]:
    """The key and the rotary base that a TeleChat config.json gives; None and the family's if it gives none.

    Raises:
        UsageError: no number, two that differ, or an extension, which TeleChat's own code does not read.
    """
    section = rope_section(config)
    if (kind := kind_of(section)) != "default":
        raise UsageError(
            f"the config says rope_scaling {kind!r}, which TeleChat's own code does not read; it extends by "
            "base_seqlen and training_seqlen. Remove it; a YAML extends by extend_method"
        )
    if section.get("rope_theta") is not None:
        config = {key: value for key, value in config.items() if key != "rope_theta"} | section
    key = one_of(config, BASE)
    return key, number(config, key, FAMILY_THETA) if key else FAMILY_THETA


def describe_telechat(config: Config, generation: Config | None, sizes: TelechatSizes) -> Description:
    """Read a TeleChat config.json, or one in MindFormers' spelling; ``sizes`` are settled with the weights.

    Raises:
        UsageError: a number is none, or the config asks for what no TeleChat model here has.
    """
    refuse_unlike_telechat(config)
    base, trained = lengths(config, sizes)
    given, theta = stated_base(config)
    if given is None or config.get("base_seqlen") is not None:  # else a base without TeleChat's rule
        theta = stretched_base(theta, base, trained, sizes.head_dim)
    return Description(
        origin="telechat v1" if "n_layer" in config and "base_seqlen" not in config else "telechat",
        sizes=sizes,
        rms_norm_eps=number(config, one_of(config, EPSILON) or EPSILON[0], 1e-5),
        theta=theta,
        seq_length=trained,
        ids=token_ids(config, generation),
    )


def describe_fields(config: ModelSettings, generation: Config | None, tied: bool | None) -> Description:
    """Read the fields of a TelechatConfig, such as those of a YAML; ``tied`` is what the weights say.

    With DYNAMIC_NTK it is the model within ``training_seqlen``.

    Raises:
        UsageError: sizes that do not fit each other.
    """
    names = ("num_layers", "hidden_size", "num_heads", "n_kv_heads", "intermediate_size", "vocab_size")
    sizes = TelechatSizes.from_hf_config({name: getattr(config, name) for name in names})
    method, length = config.extend_method, config.max_position_embedding
    theta, extension = base_of_release(config), NONE
    if method == "DYNAMIC_NTK":
        length = config.training_seqlen or length
    elif method == "YARN":
        length, extension = config.seq_length, (method, yarn_settings(config))
    elif method != "None":
        length, extension = config.seq_length, ("NTK" if method == "NTK" else "PI", stretch_factor(config))
    return Description(
        origin="telechat",
        sizes=replace(sizes, tie_word_embeddings=tied),
        rms_norm_eps=float(config.rms_norm_eps),
        theta=theta,
        seq_length=length,
        ids=token_ids(vars(config), generation),
        extension=extension,
        grows=method == "DYNAMIC_NTK",
    )


def model_section(description: Description) -> dict[str, Any]:
    """The fields of TelechatConfig that make it this model: a YAML's ``model.model_config``.

    Nothing for what is as TelechatConfig has it in every case. Of several ids of one kind a Llama gets all,
    since MindFormers stops at each; a TeleChat model the first, as its tokenizer has one (see lost_ids).

    Raises:
        UsageError: an id is none.
    """
    sizes, (method, factor) = description.sizes, description.extension
    section: dict[str, Any] = {
        "seq_length": description.seq_length,
        "hidden_size": sizes.hidden_size,
        "num_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "n_kv_heads": sizes.n_kv_heads,
        "intermediate_size": sizes.intermediate_size,
        "vocab_size": sizes.vocab_size,
        "tie_word_embeddings": bool(sizes.tie_word_embeddings),
        "rms_norm_eps": description.rms_norm_eps,
        "theta": description.theta,
    }
    if method != "None":
        section |= {"extend_method": method, "scaling_factor": factor}
    for key, value in description.ids.items():
        ids = id_list(key, value)
        if len(ids) > 1 and description.origin == "llama" and key == "eos_token_id":
            section[key] = ids
        elif ids:
            section[key] = ids[0]
    return section


def lost_ids(description: Description) -> tuple[str, ...]:
    """Notes on the ids that ``model_section`` leaves out."""
    section = model_section(description)
    return tuple(
        f"{key} of the YAMLs is {section[key]}; left out: {', '.join(map(str, ids[1:]))}"
        for key, ids in description.ids.items()
        if isinstance(ids, list) and len(ids) > 1 and section[key] != ids
    )
