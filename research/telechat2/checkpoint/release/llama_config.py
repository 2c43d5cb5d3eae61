"""config.json of a Llama model: read into a Description, or refused, and written from one."""

from typing import Any

from research.telechat2.checkpoint.release.description import Description, refuse_activation, token_ids
from research.telechat2.checkpoint.release.kinds import is_mistral, model_kind, window_of
from research.telechat2.checkpoint.release.rotary import llama_scaling, read_scaling
from research.telechat2.checkpoint.release.values import Config, flag, number, whole_number
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.common.errors import UsageError

# Keys that do not change what the model computes here: notes of the library, dropout (TeleChat's attention
# has none), how transformers computes.
_WITHOUT_EFFECT = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"),
    *("initializer_range", "use_cache", "attention_dropout", "unk_token_id", "pretraining_tp", "auto_map"),
    *("tokenizer_sha256", "max_sequence_length", "output_attentions", "output_hidden_states", "return_dict"),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_READ = {
    *(*_REQUIRED, "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("max_position_embeddings", "attention_bias", "mlp_bias", "hidden_act", "partial_rotary_factor"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "head_dim", "rope_parameters"),
    "sliding_window",
}


def is_llama(config: Config) -> bool:
    """Whether a config.json is that of a Llama model, see model_kind; UsageError for another's."""
    return model_kind(config) == "llama"


def describe_llama(config: Config, generation: Config | None = None) -> Description:
    """Read a Llama config.json.

    Raises:
        UsageError: a size is absent or impossible, or the config asks for what TeleChat's layers cannot
            compute: another activation, heads of another width, quantized weights, ``rope_scaling`` of
            another kind than linear and yarn.
    """
    sizes = _sizes(config)
    _refuse_what_differs(config, sizes)
    seq_length = _longest(config)
    theta, extension = read_scaling(config, seq_length)
    return Description(
        origin="llama",
        sizes=sizes,
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        theta=theta,
        seq_length=seq_length,
        ids=token_ids(config, generation),
        extension=extension,
        attention_bias=flag(config, "attention_bias"),
        mlp_bias=flag(config, "mlp_bias"),
        grows=False,
    )


def _longest(config: Config) -> int:
    older = whole_number(config, "max_sequence_length", 2048)
    longest = whole_number(config, "max_position_embeddings", older)
    window = window_of(config) if is_mistral(config) else None
    return longest if window is None else min(longest, window)


def unread_keys(config: Config) -> list[str]:
    """Keys of a Llama config.json that have no counterpart in TelechatConfig and may mean something."""
    return sorted(key for key in config.keys() - _READ - _WITHOUT_EFFECT if config[key] is not None)


def llama_config(description: Description, dtype: str) -> dict[str, Any]:
    """The content of config.json for an exported model; ``dtype`` is that of its weights."""
    sizes = description.sizes
    theta, scaling = llama_scaling(description.theta, description.extension)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": description.sizes.head_dim,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": description.seq_length,
        "rms_norm_eps": description.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": description.attention_bias,
        "mlp_bias": description.mlp_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": bool(sizes.tie_word_embeddings),
        **description.ids,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _sizes(config: Config) -> TelechatSizes:
    lacking = [key for key in _REQUIRED if config.get(key) is None]
    if lacking:
        raise UsageError(
            f"the config is that of a Llama model, but has no {', '.join(lacking)}; take config.json from "
            "the release of the weights"
        )
    sizes = {key: config.get(key) for key in (*_REQUIRED, "num_key_value_heads")}
    if is_mistral(config) and "num_key_value_heads" not in config:
        sizes["num_key_value_heads"] = 8  # of transformers' MistralConfig
    tied = flag(config, "tie_word_embeddings")
    return TelechatSizes.from_hf_config({**sizes, "tie_word_embeddings": tied, "num_experts": 0})


def _refuse_what_differs(config: Config, sizes: TelechatSizes) -> None:
    head_dim = sizes.head_dim
    reasons = {
        "head_dim": (head_dim, f"TeleChat's heads are hidden_size / num_attention_heads = {head_dim} wide"),
        "partial_rotary_factor": (1.0, "TeleChat rotates all channels of a head"),
    }
    refuse_activation(config)
    for key, (expected, reason) in reasons.items():
        if config.get(key) not in (None, expected):
            raise UsageError(
                f"the config says {key} = {config[key]!r}, but {reason}: this model cannot be expressed"
            )
    if config.get("quantization_config"):
        raise UsageError(
            "the config has a quantization_config; give the weights from before quantization, in float32, "
            "float16 or bfloat16"
        )
