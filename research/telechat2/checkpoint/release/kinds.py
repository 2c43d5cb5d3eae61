"""Whose model a config.json describes: TeleChat's, a Llama's, which TeleChat's layers can be, or another."""

from research.telechat2.checkpoint.release.values import Config, whole_number
from research.telechat2.common.errors import UsageError

MISTRAL_CLASSES = ("MistralForCausalLM",)
MISTRAL_WINDOW = 4096  # of transformers' MistralConfig where the config does not say
_EXPERTS = "its experts and router are of another kind"
# Why a model is none, by the beginning of its model_type; the longest that fits counts.
_OTHERS = {
    "baichuan": "its query, key and value weights are one tensor W_pack, and 13B has no rotary positions",
    "bloom": "it has no rotary positions",
    "chatglm": "it rotates half of a head's channels, and its weights are joined otherwise",
    "cohere": "its layers compute attention and feed-forward side by side",
    "deepseek": "its attention is compressed (MLA), and its experts and router are of another kind",
    "falcon": "its layers compute attention and feed-forward side by side",
    "gemma": "its norms, its activation and the scale of its embeddings are others",
    "glm": "it rotates half of a head's channels",
    "gpt": "its positions, norms and feed-forward blocks are others",
    "internlm": "its attention has biases, or its weights are joined otherwise (wqkv)",
    "llama4": _EXPERTS,
    "mixtral": _EXPERTS,
    "mllama": "it reads images",
    "opt": "its positions are learned",
    "phi": "its weights are joined otherwise, and some rotate a part of a head's channels",
    "qwen2": "its query, key and value projections have biases",
    "qwen2_moe": _EXPERTS,
    "qwen3": "it normalises queries and keys",
    "qwen3_moe": _EXPERTS,
    "qwen": "its query, key and value weights are one tensor with biases",
    "telechat3": "its layers are not those of TeleChat2",
    "xverse": "its code is its own",
}


def model_kind(config: Config) -> str:
    """``telechat`` or ``llama``; by ``model_type``, or by ``architectures`` where that is absent.

    A Mistral without a sliding window is a Llama. A config that names no model is taken for TeleChat's.

    Raises:
        UsageError: it names another model; which, and why that one cannot be expressed.
    """
    classes = _classes(config)
    kind = config.get("model_type")
    if kind is None:
        kind = next(iter(classes), "telechat")
    name = str(kind).lower()
    for suffix in ("forcausallm", "lmheadmodel", "forconditionalgeneration", "model"):
        name = name.removesuffix(suffix)
    if name == "llama":
        return "llama"
    if name == "mistral":
        _require_no_window(config)
        return "llama"
    if name.removeprefix("paralleltele").removeprefix("mindietele").removeprefix("tele") in ("chat", "chat2"):
        return "telechat"
    known = [other for other in _OTHERS if name.replace("moe", "_moe").replace("__", "_").startswith(other)]
    reason = _OTHERS[max(known, key=len)] if known else "its layers are not known to be those of either"
    raise UsageError(
        f"the config is that of a {kind} model ({', '.join(classes) or 'no architectures'}), which is "
        f"neither a TeleChat nor a Llama model: {reason}. Supported are TeleChat, Llama, and Mistral without "
        "a sliding window"
    )


def is_mistral(config: Config) -> bool:
    """Whether a config of kind ``llama`` is a Mistral's."""
    kind = config.get("model_type")
    return kind == "mistral" or (kind is None and any(name in MISTRAL_CLASSES for name in _classes(config)))


def _classes(config: Config) -> list[str]:
    """The classes of transformers that a config names."""
    given = config.get("architectures") or []
    return [str(name) for name in (given if isinstance(given, list) else [given])]


def window_of(config: Config) -> int | None:
    """Tokens that a Mistral's attention sees; None if all."""
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    return whole_number(config, "sliding_window", MISTRAL_WINDOW)


def _require_no_window(config: Config) -> None:
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if isinstance(window, int) and not (isinstance(longest, int) and window >= longest):
        raise UsageError(
            f"the config is that of a Mistral with sliding_window = {window} and max_position_embeddings = "
            f"{longest}, but TeleChat's attention sees all tokens. Texts of up to {window} tokens are the "
            f"same: in a copy of config.json set max_position_embeddings to {window}"
        )
