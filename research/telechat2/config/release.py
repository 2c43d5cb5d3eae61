"""Numbers that a YAML and the config.json beside the weights both may state: which of them a model has.

What the release says counts where the YAML states nothing; two different values are an error. Sizes are not
here: the tensors themselves are compared with those.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isclose
from pathlib import Path
from typing import Any

from research.telechat2.common.errors import UsageError
from research.telechat2.config.classes import TELECHAT_CONFIGS
from research.telechat2.config.rope import spelled_method, stretched_base
from research.telechat2.config.sections import Settings, section_of

FAMILY_THETA = 10000.0  # rotary base of every TeleChat model, written in its code and not in its config.json
DEFAULTS = {"rms_norm_eps": 1e-5, "theta": FAMILY_THETA}  # TelechatConfig's, of what changes every answer
NUMBERS = ("rms_norm_eps", "tie_word_embeddings", "base_seqlen", "training_seqlen", "num_experts_chosen")
ROTARY = ("theta", "extend_method", "scaling_factor")
IDS = ("bos_token_id", "eos_token_id")
PADDING = "pad_token_id"  # -1 is a choice of the run, so a YAML may state another
CHOSEN = "num_experts_chosen"  # of moe_config


@dataclass(frozen=True)
class Said:
    """What a config.json states: ``values`` by TelechatConfig's field names, and nothing that it does not.

    ``file``: its name for messages. ``names``: how it spells a field, where that differs. ``head_dim``: width
    of an attention head.
    """

    file: str
    values: Mapping[str, Any]
    head_dim: int
    names: Mapping[str, str] = field(default_factory=dict)


def settle_model(settings: Settings, said: Said | None, where: str) -> list[str]:
    """Complete the model of a YAML, in place, by what the release of its weights says; see ``settle``.

    How many experts take a token, ``moe_config.num_experts_chosen``, shows in no tensor either.

    Returns:
        Lines that say what was taken from where; none for the model of another project.
    """
    model, experts = section_of(settings, "model.model_config"), section_of(settings, "moe_config")
    if model.get("type", "TelechatConfig") not in TELECHAT_CONFIGS:
        return []
    stated = dict(model)
    is_mixture = experts.get("expert_num", 1) != 1
    if is_mixture:
        stated[CHOSEN] = experts.get(CHOSEN)
    elif said:
        said = replace(said, values={key: value for key, value in said.values.items() if key != CHOSEN})
    taken, notes = settle(stated, said, where)
    if is_mixture and CHOSEN in taken:
        experts[CHOSEN] = taken.pop(CHOSEN)
    model |= taken
    return notes


def settle(stated: Mapping[str, Any], said: Said | None, where: str) -> tuple[Settings, list[str]]:
    """Complete a YAML's ``model_config`` by what the release of the weights says.

    Args:
        stated: the YAML's settings with all changes, without defaults.
        said: what the config.json of the weights says; None where there is none.
        where: what messages call ``stated``.

    Returns:
        The values that ``stated`` lacks, and a line for each kind of thing that a user should know.

    Raises:
        UsageError: both state a value, and differ; every such value is named.
    """
    stated = {name: value for name, value in stated.items() if value is not None}
    if said is None:
        return {}, _default_notes(stated, f"neither {where} nor a config.json beside the weights states")
    values = dict(said.values)
    notes = _keep_own_rotation(stated, values, said, where)
    if differing := _differing(stated, values, said):
        raise UsageError(
            f"{where} and {said.file} state different values for one model:\n  "
            + "\n  ".join(differing)
            + f"\nTo use what {said.file} says, remove these lines from {where}. If it is wrong, correct it "
            "there: the weights were trained with one of the two."
        )
    taken = {name: value for name, value in values.items() if name not in stated and value is not None}
    listed = [
        f"{name} {value}"
        for name, value in taken.items()
        if name in (*NUMBERS, *ROTARY) and value is not False
    ]
    if listed:
        notes.insert(0, f"taken from {said.file}: {', '.join(listed)}")
    known = stated | taken
    length, trained = known.get("seq_length"), known.get("training_seqlen")
    if "extend_method" not in known and isinstance(length, int) and trained and length > trained:
        notes.append(
            f"seq_length {length} exceeds training_seqlen {trained}: longer texts are read by extend_method "
            "DYNAMIC_NTK, as in the torch release"
        )
    return taken, notes + _default_notes(known, f"neither {where} nor {said.file} states")


def _keep_own_rotation(stated: Settings, values: Settings, said: Said, where: str) -> list[str]:
    """Leave out of ``values`` the lengths of a release whose base the YAML replaces by one of its own.

    config.json of a TeleChat model states no base; its lengths belong to that of the family.
    """
    own, base, trained = stated.get("theta"), values.get("base_seqlen"), values.get("training_seqlen")
    if own is None or base is None or trained is None or "theta" in values or _same(own, FAMILY_THETA):
        return []
    if not _states_lengths(stated):
        del values["base_seqlen"], values["training_seqlen"]
    width = said.head_dim
    if width > 2 and _same(own, stretched_base(FAMILY_THETA, base, trained, width)):
        return []  # the release's own, within its trained length
    return [
        f"theta {own} of {where} replaces the rotary base of the release ({FAMILY_THETA}, base_seqlen "
        f"{base}, training_seqlen {trained})"
    ]


def _states_lengths(stated: Mapping[str, Any]) -> bool:
    return any(name in stated for name in ("base_seqlen", "training_seqlen"))


def _differing(stated: Mapping[str, Any], values: Settings, said: Said) -> list[str]:
    """A line for each value that both state differently."""
    found = []

    def compare(name: str, other: str, same: bool) -> None:
        if not same:
            theirs = said.names.get(other, other)
            found.append(f"{name}: {stated[name]}; {theirs} in {Path(said.file).name}: {values[other]}")

    for name in (*NUMBERS, "theta", "scaling_factor"):
        if name in stated and name in values:
            compare(name, name, _same(stated[name], values[name]))
    if "extend_method" in stated and "extend_method" in values:
        compare(
            "extend_method",
            "extend_method",
            spelled_method(stated["extend_method"]) == spelled_method(values["extend_method"]),
        )
    if "max_position_embedding" in stated and "training_seqlen" in values and not _states_lengths(stated):
        compare(
            "max_position_embedding",
            "training_seqlen",
            _same(stated["max_position_embedding"], values["training_seqlen"]),
        )
    for name in IDS:
        if name in stated and name in values:
            compare(name, name, _ids(stated[name]) <= _ids(values[name]))
    return found


def _ids(value: object) -> set[object]:
    return set(value) if isinstance(value, (list, tuple)) else {value}


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are one value; text of a number, as YAML 1.1 reads 1e-5, is that number."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    try:
        return isclose(float(one), float(other), rel_tol=1e-9)
    except (TypeError, ValueError):
        return bool(one == other)


def _default_notes(known: Mapping[str, Any], who: str) -> list[str]:
    absent = [f"{name} {value}" for name, value in DEFAULTS.items() if name not in known]
    if "theta" not in known and known.get("base_seqlen") is not None:
        absent = [text for text in absent if not text.startswith("theta")]  # the family's, as the lengths are
    return [f"{', '.join(absent)}: the default, which {who}"] if absent else []
