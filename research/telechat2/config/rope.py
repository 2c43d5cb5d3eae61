"""How positions beyond the trained length are read: the settings of it, and their checks.

Needs neither MindSpore nor MindFormers, as config/model.py, of which this is a part.
"""

import math
from collections.abc import Mapping

from research.telechat2.common.errors import UsageError
from research.telechat2.config.kinds import check_number, is_number
from research.telechat2.config.model_settings import ModelSettings

EXTEND_METHODS = ("None", "PI", "linear", "NTK", "YARN", "DYNAMIC_NTK")
_FACTOR_METHODS = ("PI", "linear", "NTK")
_YARN_KEYS = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"
)  # fmt: skip
_LENGTHS = ("base_seqlen", "training_seqlen")


def complete_extension(config: ModelSettings) -> None:
    """Write ``extend_method`` as this version spells it, and fill in what follows from other fields."""
    config.extend_method = spelled_method(config.extend_method or _method_of_release(config))
    if isinstance(config.scaling_factor, dict):
        config.scaling_factor = dict(config.scaling_factor)
    if config.extend_method == "DYNAMIC_NTK" or (config.base_seqlen, config.training_seqlen) != (None, None):
        if config.base_seqlen is None:
            config.base_seqlen = config.max_position_embedding
        if config.training_seqlen is None:
            config.training_seqlen = config.max_position_embedding


def spelled_method(method: object) -> str:
    """A name of ``EXTEND_METHODS`` as this version spells it; what is none of them as it is."""
    spelled = {name.lower(): name for name in EXTEND_METHODS}
    return spelled.get(str(method).lower(), str(method))


def _method_of_release(config: ModelSettings) -> str:
    """The method where none is chosen: the torch release stretches what exceeds the trained length."""
    trained = config.training_seqlen
    return "DYNAMIC_NTK" if is_number(trained) and config.seq_length > trained else "None"


def trained_alpha(length: int, base_seqlen: int) -> int:
    """TeleChat's rule: by ``alpha^(d/(d-2))``, d the width of a head, theta grows for ``length`` tokens.

    ``alpha = max(2^ceil(log2(length / base_seqlen) + 1) - 1, 1)``, which is 1 up to ``base_seqlen``.
    """
    doublings = (-(-length // base_seqlen) - 1).bit_length()  # ceil(log2(length / base_seqlen)), at least 0
    return (2 << doublings) - 1


def stretched_base(theta: float, base_seqlen: int, length: int, head_dim: int) -> float:
    """The rotary base for texts of ``length`` tokens by TeleChat's rule: ``theta`` up to ``base_seqlen``."""
    if length <= base_seqlen:
        return theta
    return float(theta * trained_alpha(length, base_seqlen) ** (head_dim / (head_dim - 2)))


def base_of_release(config: ModelSettings) -> float:
    """The rotary base ``theta`` within the trained length: stretched where that exceeds ``base_seqlen``."""
    theta, head_dim = float(config.theta), config.hidden_size // config.num_heads
    base, trained = config.base_seqlen, config.training_seqlen
    return theta if base is None or trained is None else stretched_base(theta, base, trained, head_dim)


def yarn_scale(settings: Mapping[str, float]) -> float:
    """What YaRN multiplies cos and sin by (Peng et al. 2023, section 3.4; mscale as in DeepSeek-V2)."""
    grown, kept = (
        0.1 * settings.get(key, default) * math.log(settings["factor"]) + 1
        for key, default in (("mscale", 1.0), ("mscale_all_dim", 0.0))
    )
    return grown / kept


def check_extension(config: ModelSettings) -> None:
    """Refuse methods and factors that are none, and settings that the method would ignore.

    Raises:
        UsageError: with the values.
    """
    method = config.extend_method
    if method not in EXTEND_METHODS:
        raise UsageError(f"extend_method is {method!r}; it must be one of {', '.join(EXTEND_METHODS)}.")
    if method in _FACTOR_METHODS:
        stretch_factor(config)
    elif method == "YARN":
        yarn_settings(config)
    elif config.scaling_factor != 1.0:
        raise UsageError(
            f"scaling_factor is {config.scaling_factor}, but extend_method is {method!r} and would ignore "
            "it; choose another extend_method or leave scaling_factor at 1.0."
        )
    if method == "None" and config.max_position_embedding < config.seq_length:
        trained = config.max_position_embedding
        name = "training_seqlen" if config.training_seqlen == trained else "max_position_embedding"
        raise UsageError(
            f"seq_length {config.seq_length} exceeds {name} {trained}, the length the model was trained at; "
            "choose an extend_method, or change one of the two."
        )
    _check_dynamic(config)


def _check_dynamic(config: ModelSettings) -> None:
    """The release's lengths, and the settings of DYNAMIC_NTK, which no other method reads."""
    dynamic = config.extend_method == "DYNAMIC_NTK"
    if config.extend_by_prompt and not dynamic:
        raise UsageError(
            f"extend_by_prompt is {config.extend_by_prompt}, but extend_method is {config.extend_method!r}; "
            "only DYNAMIC_NTK reads it. Remove it, or choose that method."
        )
    if config.base_seqlen is None:
        return
    for name in _LENGTHS:
        check_number(name, getattr(config, name), whole=True, least=1)
    if config.max_position_embedding != config.training_seqlen:
        raise UsageError(
            f"max_position_embedding is {config.max_position_embedding} and training_seqlen "
            f"{config.training_seqlen}, but both are the length the model was trained at; remove one of them."
        )
    stretched = dynamic or config.training_seqlen > config.base_seqlen
    if stretched and config.hidden_size // config.num_heads < 4:
        raise UsageError(
            f"head_dim is {config.hidden_size // config.num_heads}; DYNAMIC_NTK needs at least 4 (its base "
            "grows by a power of head_dim / (head_dim - 2))."
        )
    if dynamic and config.use_past and not config.is_dynamic:
        raise UsageError(
            "is_dynamic is False, but MindFormers predicts with extend_method DYNAMIC_NTK only where it is "
            "True; set is_dynamic: True."
        )


def stretch_factor(config: ModelSettings) -> float:
    """The factor of PI, linear and NTK: ``scaling_factor``, a number or ``{factor: number}``.

    Raises:
        UsageError: it is neither, or less than 1.
    """
    factor = config.scaling_factor
    if isinstance(factor, dict) and list(factor) == ["factor"]:
        factor = factor["factor"]
    if not is_number(factor) or factor < 1:
        raise UsageError(
            f"scaling_factor is {config.scaling_factor!r}; {config.extend_method} takes a number of at least "
            "1, such as 2.0."
        )
    return float(factor)


def yarn_settings(config: ModelSettings) -> dict[str, float]:
    """The settings of YARN, complete.

    Returns:
        ``factor``, ``original_max_position_embeddings`` (by default ``max_position_embedding``),
        ``beta_fast`` (32), ``beta_slow`` (1), ``mscale`` (1) and ``mscale_all_dim`` (0).

    Raises:
        UsageError: no dictionary, an unknown or missing key, or a value that cannot be.
    """
    given = config.scaling_factor
    if not isinstance(given, dict) or "factor" not in given or set(given) - set(_YARN_KEYS):
        raise UsageError(
            f"scaling_factor is {given!r}; YARN takes a section with factor, and if need be "
            f"{', '.join(_YARN_KEYS[1:])}."
        )
    if ("mscale" in given) != ("mscale_all_dim" in given):
        raise UsageError(
            f"scaling_factor is {given!r}; YARN's mscale and mscale_all_dim make one scale: give both or "
            "none of them."
        )
    defaults = {
        "original_max_position_embeddings": config.max_position_embedding,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0,
    }  # fmt: skip
    found = defaults | given
    bounds = {"factor": 1, "original_max_position_embeddings": 1} | dict.fromkeys(_YARN_KEYS[2:], 0)
    for name, least in bounds.items():
        check_number(f"scaling_factor.{name}", found[name], least=least)
    if found["beta_fast"] < found["beta_slow"] or not found["beta_slow"]:
        raise UsageError(
            f"scaling_factor.beta_fast is {found['beta_fast']} and beta_slow {found['beta_slow']}; they "
            "count turns over the trained length, beta_fast not fewer than beta_slow and both above 0."
        )
    return found
