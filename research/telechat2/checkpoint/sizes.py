"""The sizes that a checkpoint's shapes follow from: read from a config, or from the tensors themselves."""

from dataclasses import dataclass

# One line per size: the spelling of TeleChat's config.json first, then MindFormers' own.
SPELLINGS = {
    "num_layers": ("n_layer", "num_layers"),
    "hidden_size": ("hidden_size",),
    "num_heads": ("n_head", "num_heads"),
    "n_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "intermediate_size": ("ffn_hidden_size", "intermediate_size"),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True)
class TelechatSizes:
    """What the shapes of a dense TeleChat checkpoint depend on.

    ``kv_size`` is ``n_kv_heads * head_dim``, the rows of all keys of a layer. ``num_heads`` and
    ``n_kv_heads`` are None when only tensors were there to read: they do not show how rows make heads.
    ``tie_word_embeddings`` None means that the config does not say.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    kv_size: int
    num_heads: int | None = None
    n_kv_heads: int | None = None
    tie_word_embeddings: bool | None = None

    @classmethod
    def from_hf_config(cls, config: dict) -> "TelechatSizes":
        """Sizes from the content of a config.json, TeleChat's key names or MindFormers'.

        Raises:
            ValueError: a size is absent, is not a positive whole number, or does not divide as it must.
        """
        found = {}
        for size, keys in SPELLINGS.items():
            key = next((key for key in keys if config.get(key) is not None), None)
            if key is None and size == "n_kv_heads":  # multi-head attention: the key is often left out
                continue
            if key is None:
                raise ValueError(
                    f"the config has no {' or '.join(keys)}, so it is not that of a TeleChat model; "
                    f"it has {sorted(config)[:10]}"
                )
            value = config[key]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"the config says {key} = {value!r}; expected a positive whole number")
            found[size] = value
        found.setdefault("n_kv_heads", found["num_heads"])
        tied = config.get("tie_word_embeddings")
        if tied is not None and not isinstance(tied, bool):
            raise ValueError(f"the config says tie_word_embeddings = {tied!r}; expected true or false")
        if found["hidden_size"] % found["num_heads"]:
            raise ValueError(
                f"the config says hidden_size = {found['hidden_size']} and {found['num_heads']} heads; "
                "the heads must divide hidden_size"
            )
        if found["num_heads"] % found["n_kv_heads"]:
            raise ValueError(
                f"the config says {found['num_heads']} heads and {found['n_kv_heads']} key/value heads; "
                "the second must divide the first"
            )
        head_dim = found["hidden_size"] // found["num_heads"]
        return cls(kv_size=found["n_kv_heads"] * head_dim, tie_word_embeddings=tied, **found)

    def dims(self) -> dict[str, int]:
        """The symbols that the table writes shapes in."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.intermediate_size,
            "key_value": 2 * self.kv_size,
        }


def feed_forward_width(hidden_size: int, multiplier: float | None, multiple_of: int) -> int:
    """Width of the feed-forward block where the config gives none (spec 1.2)."""
    width = 4 * hidden_size
    if multiplier is not None:
        width = int((multiplier + 0.01) * width)
    width = int(2 * width / 3)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)
