"""Rotary bases and their extension, between TeleChat's rule, Llama's ``rope_scaling`` and TelechatConfig."""

from typing import Any

from research.telechat2.checkpoint.release.values import Config, number, one_of
from research.telechat2.common.errors import UsageError
from research.telechat2.config.rope import yarn_scale

Extension = tuple[str, Any]  # extend_method and scaling_factor of a YAML
NONE: Extension = ("None", 1.0)
_YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


def read_scaling(config: Config, seq_length: int) -> tuple[float, Extension]:
    """Rotary base and extension of a Llama config whose longest text has ``seq_length`` tokens.

    As transformers 5 reads it: the section is ``rope_scaling``, or else ``rope_parameters``; the base is the
    section's, or else that beside it.

    Raises:
        UsageError: a kind of extension, or a setting of it, that TelechatConfig does not have; two sections
            that differ.
    """
    scaling = rope_section(config)
    theta = number(scaling, "rope_theta", number(config, "rope_theta", 10000.0))
    kind = kind_of(scaling)
    if kind == "default":
        return theta, NONE
    if kind == "linear":
        return theta, ("PI", _factor(scaling))
    if kind == "yarn":
        return theta, ("YARN", _read_yarn(scaling, seq_length))
    raise UsageError(
        f"the config says rope_scaling {kind!r}; only 'linear' (extend_method PI) and 'yarn' (YARN) can be "
        "expressed. For texts no longer than the model was first trained on, remove rope_scaling from a copy "
        "of config.json and set max_position_embeddings to that length, if its authors say that this is exact"
    )


def rope_section(config: Config) -> dict[str, Any]:
    """``rope_scaling`` or ``rope_parameters`` of a config; empty where there is none."""
    given: dict[str, dict[str, Any]] = {
        key: config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)
    }
    for key, section in given.items():
        if not isinstance(section, dict):
            raise UsageError(f"the config says {key} = {section!r}; expected a section such as rope_type")
        if nested := [name for name, value in section.items() if isinstance(value, dict)]:
            raise UsageError(
                f"the config says {key} for {', '.join(nested)}; TeleChat rotates all layers alike: this "
                "model cannot be expressed"
            )
        if section.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UsageError(
                f"the config says {key}.partial_rotary_factor = {section['partial_rotary_factor']!r}, but "
                "TeleChat rotates all channels of a head: this model cannot be expressed"
            )
    first, *others = list(given.values()) or [dict[str, Any]()]
    for other in others:
        both = [first | {"rope_type": kind_of(first)}, other | {"rope_type": kind_of(other)}]
        keys = [key for key in sorted(both[0].keys() | both[1].keys()) if key != "type"]
        if differing := [key for key in keys if both[0].get(key) != both[1].get(key)]:
            key = differing[0]
            raise UsageError(
                f"the config has two sections that differ: rope_scaling.{key} = {both[0].get(key)!r}, "
                f"rope_parameters.{key} = {both[1].get(key)!r}; remove the one that the weights were not "
                "trained with"
            )
    return first


def kind_of(section: Config) -> Any:
    """The kind of extension that such a section names."""
    key = one_of(section, ("rope_type", "type"))
    return section[key] if key else "default"


def _factor(scaling: Config) -> float:
    if scaling.get("factor") is None:
        raise UsageError(f"the config says rope_scaling {kind_of(scaling)!r} without factor; add it")
    return number(scaling, "factor", 1.0)


def _read_yarn(scaling: Config, seq_length: int) -> dict[str, float]:
    original = number(scaling, "original_max_position_embeddings", seq_length)
    factor = _factor(scaling)
    settings = {
        "factor": factor,
        "original_max_position_embeddings": int(original),
        "beta_fast": number(scaling, "beta_fast", 32.0),
        "beta_slow": number(scaling, "beta_slow", 1.0),
    }
    if scaling.get("truncate") is False:
        raise UsageError("the config says rope_scaling yarn with truncate false, which cannot be expressed")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        settings |= {key: number(scaling, key, 1.0) for key in ("mscale", "mscale_all_dim")}
    if scaling.get("attention_factor") not in (None, yarn_scale(settings)):
        raise UsageError(
            f"the config says rope_scaling yarn with attention_factor {scaling['attention_factor']!r}; only "
            f"the one that follows from the factor, {yarn_scale(settings)!r}, can be expressed"
        )
    return settings


def llama_scaling(theta: float, extension: Extension) -> tuple[float, dict[str, Any] | None]:
    """``rope_theta`` and ``rope_scaling`` of a Llama that rotates as a TelechatConfig with these."""
    method, factor = extension
    if method == "NTK":
        return theta * factor, None
    if method == "PI":
        return theta, {"rope_type": "linear", "factor": factor}
    if method == "YARN":
        settings = {key: factor[key] for key in _YARN_KEYS} | {"attention_factor": yarn_scale(factor)}
        if factor.get("mscale") and factor.get("mscale_all_dim"):
            settings |= {key: factor[key] for key in ("mscale", "mscale_all_dim")}
        return theta, {"rope_type": "yarn"} | settings
    return theta, None
