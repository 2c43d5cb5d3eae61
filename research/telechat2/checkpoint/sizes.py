"""The sizes that a checkpoint's shapes follow from: read from a config, or from the tensors themselves."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from research.telechat2.checkpoint.release.values import Config, one_of
from research.telechat2.common.errors import UsageError, naming
from research.telechat2.common.files import read_json
from research.telechat2.common.tables import listed
from research.telechat2.config.model_settings import ModelSettings

CONFIG = "config.json"
_PART_OF_A_RUN = re.compile(r"iteration_\d+|rank_\d+")

# One line per size: the spelling of TeleChat's config.json first, then MindFormers' own, then Llama's.
SPELLINGS = {
    "num_layers": ("n_layer", "num_layers", "num_hidden_layers"),
    "hidden_size": ("hidden_size",),
    "num_heads": ("n_head", "num_heads", "num_attention_heads"),
    "n_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "intermediate_size": ("ffn_hidden_size", "intermediate_size"),
    "vocab_size": ("vocab_size",),
    # The 39B's config.json is not public; MindFormers' own key is expert_num, within moe_config.
    "num_experts": ("num_experts", "expert_num", "num_local_experts", "moe_num_experts"),
}
OPTIONAL = ("n_kv_heads", "num_experts")


@dataclass(frozen=True)
class TelechatSizes:
    """What the shapes of a TeleChat checkpoint depend on.

    ``kv_size`` is ``n_kv_heads * head_dim``, the rows of all keys of a layer. ``num_heads`` and
    ``n_kv_heads`` are None when only tensors were there to read: they do not show how rows make heads.
    ``tie_word_embeddings`` None means that the config does not say. ``num_experts`` is that of every layer, 0
    in a dense model, None where the config does not say; ``intermediate_size`` is the width of one expert.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    kv_size: int
    num_heads: int | None = None
    n_kv_heads: int | None = None
    tie_word_embeddings: bool | None = None
    num_experts: int | None = None

    @classmethod
    def from_hf_config(cls, config: Config) -> "TelechatSizes":
        """Sizes from the content of a config.json, TeleChat's key names or MindFormers'.

        0 and 1 experts both mean a dense model, as 1 does in MindFormers. UsageError if a size is absent, is
        not a positive whole number, is given twice with two values, or does not divide as it must.
        """
        found: dict[str, int] = {}
        config = _with_moe_section(config)
        for size, keys in SPELLINGS.items():
            key = one_of(config, keys)
            if key is not None:
                value = config[key]
                if isinstance(value, bool) or not isinstance(value, int) or value < (size != "num_experts"):
                    raise UsageError(f"the config says {key} = {value!r}; expected a positive whole number")
                found[size] = value
            elif size not in OPTIONAL:
                there = listed(sorted(config))
                raise UsageError(
                    f"the config has no {' or '.join(keys)}, as a TeleChat model's has; it has {there}"
                )
        found.setdefault("n_kv_heads", found["num_heads"])  # multi-head attention: the key is often left out
        if found.get("num_experts") == 1:
            found["num_experts"] = 0
        tied = config.get("tie_word_embeddings")
        if tied is not None and not isinstance(tied, bool):
            raise UsageError(f"the config says tie_word_embeddings = {tied!r}; expected true or false")
        for size, divisor in (("hidden_size", "num_heads"), ("num_heads", "n_kv_heads")):
            if found[size] % found[divisor]:
                raise UsageError(
                    f"the config says {size} = {found[size]} and {divisor} = {found[divisor]}; the second "
                    "must divide the first"
                )
        head_dim = found["hidden_size"] // found["num_heads"]
        return cls(kv_size=found["n_kv_heads"] * head_dim, tie_word_embeddings=tied, **found)

    def unlike(self, wanted: "TelechatSizes", sizes: Iterable[str]) -> list[str]:
        """Which of ``sizes`` differ, in words; None is any value."""
        found = ((size, getattr(self, size), getattr(wanted, size)) for size in sizes)
        return [f"{size} {n} instead of {m}" for size, n, m in found if None not in (n, m) and n != m]

    @property
    def kv_heads(self) -> int:
        """``n_kv_heads``, which must be known."""
        assert self.n_kv_heads is not None
        return self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head; ``num_heads`` must be known."""
        assert self.num_heads is not None
        return self.hidden_size // self.num_heads

    def dims(self) -> dict[str, int]:
        """The symbols that the table writes shapes in."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.intermediate_size,
            "key_value": 2 * self.kv_size,
            "experts": self.num_experts or 0,
            "1": 1,
        }

    def describe(self) -> str:
        """The sizes in words, as messages give them."""
        experts = f"{self.num_experts} experts of " if self.num_experts else ""
        return (
            f"{self.num_layers} layers, hidden size {self.hidden_size}, {experts}feed-forward size "
            f"{self.intermediate_size}, vocabulary {self.vocab_size}"
        )


def sizes_of_model(config: ModelSettings) -> TelechatSizes:
    """The sizes of a TelechatConfig's model."""
    experts = config.moe.num_experts if config.moe else 0
    same = {field.name for field in fields(TelechatSizes)} - {"kv_size", "num_experts"}
    own = {name: getattr(config, name) for name in same}
    return TelechatSizes(kv_size=config.n_kv_heads * config.head_dim, num_experts=experts, **own)


def config_beside(path: Path) -> Path | None:
    """The config.json of a checkpoint's file or folder; None if there is none.

    For ``x.safetensors`` it is ``x.safetensors.config.json``, or else ``config.json`` of its folder; for a
    folder ``iteration_*`` or ``rank_*`` also that of the folder above.
    """
    if not path.is_dir() and (own := path.with_name(f"{path.name}.{CONFIG}")).is_file():
        return own
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    while not (folder / CONFIG).is_file():
        if not _PART_OF_A_RUN.fullmatch(folder.name):
            return None
        folder = folder.parent
    return folder / CONFIG


def sizes_beside(path: Path) -> TelechatSizes | None:
    """Sizes from the config.json of a checkpoint, see config_beside; None if there is none."""
    file = config_beside(path)
    if file is None:
        return None
    with naming(file):
        return TelechatSizes.from_hf_config(read_json(file) or {})


def _with_moe_section(config: Config) -> Config:
    """``config`` with the ``expert_num`` of MindFormers' nested section beside the other keys."""
    section = config.get("moe_config")
    if section is None:
        return config
    if not isinstance(section, dict):
        raise UsageError(
            f"the config says moe_config = {section!r}; expected an object such as expert_num: 16"
        )
    return {"expert_num": section.get("expert_num"), **config}
