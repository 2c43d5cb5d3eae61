"""How positions beyond the trained length are read: the settings of it, and their checks.

Needs neither MindSpore nor MindFormers, as telechat_config_rules.py, of which this is a part.
"""

EXTEND_METHODS = ("None", "PI", "linear", "NTK", "YARN", "DYNAMIC_NTK")
_FACTOR_METHODS = ("PI", "linear", "NTK")
_YARN_KEYS = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"
)  # fmt: skip
_LENGTHS = ("base_seqlen", "training_seqlen")


def complete_extension(values: dict) -> None:
    """Write ``extend_method`` as this version spells it, and fill in what follows from other fields."""
    spelled = {name.lower(): name for name in EXTEND_METHODS}
    method = str(values["extend_method"])
    values["extend_method"] = spelled.get(method.lower(), method)
    if isinstance(values["scaling_factor"], dict):
        values["scaling_factor"] = dict(values["scaling_factor"])
    if values["extend_method"] == "DYNAMIC_NTK":
        for name in _LENGTHS:
            if values[name] is None:
                values[name] = values["max_position_embedding"]


def check_extension(config) -> None:
    """Refuse methods and factors that are none, and settings that the method would ignore.

    Raises:
        ValueError: with the values.
    """
    method = config.extend_method
    if method not in EXTEND_METHODS:
        raise ValueError(f"extend_method is {method!r}; it must be one of {', '.join(EXTEND_METHODS)}.")
    if method in _FACTOR_METHODS:
        stretch_factor(config)
    elif method == "YARN":
        yarn_settings(config)
    elif config.scaling_factor != 1.0:
        raise ValueError(
            f"scaling_factor is {config.scaling_factor}, but extend_method is {method!r} and would ignore "
            "it; choose another extend_method or leave scaling_factor at 1.0."
        )
    if method == "None" and config.max_position_embedding < config.seq_length:
        raise ValueError(
            f"seq_length {config.seq_length} exceeds max_position_embedding "
            f"{config.max_position_embedding}, the length the model was trained at; "
            "choose an extend_method, or change one of the two."
        )
    _check_dynamic(config)


def _check_dynamic(config) -> None:
    """The settings of DYNAMIC_NTK, which no other method reads."""
    if config.extend_method != "DYNAMIC_NTK":
        for name, unset in (*((name, None) for name in _LENGTHS), ("extend_by_prompt", False)):
            if getattr(config, name) != unset:
                raise ValueError(
                    f"{name} is {getattr(config, name)}, but extend_method is {config.extend_method!r}; only "
                    "DYNAMIC_NTK reads it. Remove it, or choose that method."
                )
        return
    for name in _LENGTHS:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if config.hidden_size // config.num_heads < 4:
        raise ValueError(
            f"head_dim is {config.hidden_size // config.num_heads}; DYNAMIC_NTK needs at least 4 "
            "(its base grows by a power of head_dim / (head_dim - 2))."
        )
    if config.use_past and not config.is_dynamic:
        raise ValueError(
            "is_dynamic is False, but MindFormers predicts with extend_method DYNAMIC_NTK only where it is "
            "True; set is_dynamic: True."
        )


def stretch_factor(config) -> float:
    """The factor of PI, linear and NTK: ``scaling_factor``, a number or ``{factor: number}``.

    Raises:
        ValueError: it is neither, or less than 1.
    """
    factor = config.scaling_factor
    if isinstance(factor, dict) and list(factor) == ["factor"]:
        factor = factor["factor"]
    if not _is_number(factor) or factor < 1:
        raise ValueError(
            f"scaling_factor is {config.scaling_factor!r}; {config.extend_method} takes a number of at least "
            "1, such as 2.0."
        )
    return float(factor)


def yarn_settings(config) -> dict:
    """The settings of YARN, complete.

    Returns:
        ``factor``, ``original_max_position_embeddings`` (by default ``max_position_embedding``),
        ``beta_fast`` (32), ``beta_slow`` (1), ``mscale`` (1) and ``mscale_all_dim`` (0).

    Raises:
        ValueError: no dictionary, an unknown or missing key, or a value that cannot be.
    """
    given = config.scaling_factor
    if not isinstance(given, dict) or "factor" not in given or set(given) - set(_YARN_KEYS):
        raise ValueError(
            f"scaling_factor is {given!r}; YARN takes a section with factor, and if need be "
            f"{', '.join(_YARN_KEYS[1:])}."
        )
    if ("mscale" in given) != ("mscale_all_dim" in given):
        raise ValueError(
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
        if not _is_number(found[name]) or found[name] < least:
            raise ValueError(
                f"scaling_factor.{name} is {found[name]!r}; it must be a number of at least {least}."
            )
    if found["beta_fast"] < found["beta_slow"] or not found["beta_slow"]:
        raise ValueError(
            f"scaling_factor.beta_fast is {found['beta_fast']} and beta_slow {found['beta_slow']}; they "
            "count turns over the trained length, beta_fast not fewer than beta_slow and both above 0."
        )
    return found


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
