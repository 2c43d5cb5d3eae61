"""What a TeleChat2 model's configuration may be: rules that need neither MindSpore nor MindFormers.

TelechatConfig obeys them when it is made, and telechat_plan.py's check before that. A ``config`` is anything
with TelechatConfig's fields as attributes.
"""

import difflib
import logging
import math

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.rope import check_extension, complete_extension
from research.telechat2.config.sampling import check_sampling

logger = logging.getLogger("telechat2")

DTYPES = ("float32", "float16", "bfloat16")
DTYPE_FIELDS = (
    "compute_dtype",
    "param_init_type",
    "embedding_init_type",
    "layernorm_compute_type",
    "softmax_compute_type",
    "rotary_dtype",
    "res_dtype",
)
# Keys of older TeleChat2 YAMLs that have no effect: why, and the values that ask for nothing that this model
# does not do anyway; None: all values.
DEAD_KEYS = {
    "pretrain_seqlen": (
        "nothing ever read it; max_position_embedding is the length the model was trained at", None
    ),
    "use_past_shard": ("nothing ever read it", None),
    "use_rope_slice": ("the rotary operators are chosen by the target", None),
    "use_attn_mask_compression": ("the causal mask is always compressed", None),
    "hidden_act": ("TeleChat2 is SwiGLU throughout", ("silu", "swiglu", "SwiGLU", None)),
    "out_proj_has_bias": ("every TeleChat2 model has a bias on wo and w2", (True,)),
    "qkv_has_bias": ("no TeleChat2 model has a bias on wq and wk_v", (False,)),
    "parallel_optimizer": ("parallel.enable_parallel_optimizer decides on that", None),
    "quant": ("weights are not quantized here", ("", None)),
    "return_hidden_states": ("prediction returns logits", (False,)),
    "input_sliced_sig": ("a record is shifted by one inside of the model", (False,)),
    "npu_mem_size": ("MindIE's own configuration decides on that", None),
    "router_dense_type": ("the router is computed in float32", ("float32",)),
}  # fmt: skip
# Keys of MindFormers' models for what is not in this one.
OTHERS_KEYS = {
    "use_ring_attention": (
        "MindSpore compiles its ring attention, but that no query sees a later key cannot be shown without "
        "NPUs; parallel_config.context_parallel splits sequences, with context_parallel_algo colossalai_cp "
        "(keys and values are gathered), ulysses_cp (heads are exchanged for tokens) or hybrid_cp (both)"
    ),
}
# Keys that the Trainer adds to a model's config and that say nothing about the model.
TRAINER_KEYS = ("dataset_config", "type", "auto_register", "auto_map")
# What MindFormers' PretrainedConfig, its Trainer and its YAML reader set besides the model's own fields.
LIBRARY_KEYS = (
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "pretrained_model_dir",
    "mindformers_version",
    "tokenizer_class",
    "architectures",
    "is_encoder_decoder",
    "is_sample_acceleration",
    "quantization_config",
    "quantization",
    "pet_config",
    "model_type",
    "parallel_decoding_params",
    *TRAINER_KEYS,
)


def library_keys(extra: dict, known: dict) -> dict:
    """``extra`` without keys that are not the model's; a key without effect is named in a warning.

    Raises:
        UsageError: nobody knows a key, or a key without effect asks for what this model does not do.
    """
    for key, value in extra.items():
        if key in DEAD_KEYS:
            reason, harmless = DEAD_KEYS[key]
            if harmless is not None and value not in harmless:
                raise UsageError(f"model_config has {key!r}: {value!r}, but {reason}. Remove it.")
            logger.warning("model_config.%s has no effect: %s.", key, reason)
            continue
        if key in OTHERS_KEYS:
            raise UsageError(
                f"model_config has the key {key!r}, which this model does not have: {OTHERS_KEYS[key]}. "
                f"Remove {key}."
            )
        if key not in LIBRARY_KEYS:
            missing = [name for name in known if name not in extra]
            nearest = difflib.get_close_matches(key, missing, n=1, cutoff=0.6)
            hint = (
                f"; did you mean {nearest[0]!r}?"
                if nearest
                else f"; known keys are {', '.join(sorted(known))}."
            )
            raise UsageError(f"model_config has the key {key!r}, which TelechatConfig does not know{hint}")
    left = ("model_type", *TRAINER_KEYS, *DEAD_KEYS)
    return {key: value for key, value in extra.items() if key not in left}


def dtype_name(name: str, value) -> str:
    """``value`` as one of DTYPES, for the field ``name``; raises UsageError if it is none."""
    if str(value).lower() not in DTYPES:
        raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(DTYPES)}.")
    return str(value).lower()


def complete(values: dict) -> None:
    """Fill in, in a dictionary of all fields, those that are None because they follow from others."""
    values["embedding_init_type"] = values["embedding_init_type"] or values["param_init_type"]
    if values["n_kv_heads"] is None:
        values["n_kv_heads"] = values["num_heads"]
    values["max_position_embedding"] = (
        values["max_position_embedding"] or values["training_seqlen"] or values["seq_length"]
    )
    values["document_start_ids"] = list(values["document_start_ids"])
    complete_extension(values)
    if values["intermediate_size"] is None:
        values["intermediate_size"] = feed_forward_width(
            values["hidden_size"], values["ffn_dim_multiplier"], values["multiple_of"]
        )


def check_fields(config, *further: tuple) -> None:
    """Refuse sizes that do not divide, unknown choices, and what this version would have to ignore.

    ``further``: checks that need sound sizes, as of check_all; their errors are raised with these.

    Raises:
        UsageError: with the values.
    """
    check_all((_check_booleans, config), (_check_sizes, config), (_check_reals, config))
    check_all((_check_choices, config), (_check_rest, config), *further)


def _check_booleans(config) -> None:
    """The text "False" would be taken for true."""
    for name in (
        "tie_word_embeddings", "extend_by_prompt", "use_past", "qkv_concat", "is_dynamic",
        "use_flash_attention", "do_sample", "disable_lazy_inline",
    ):  # fmt: skip
        if not isinstance(getattr(config, name), bool):
            raise UsageError(
                f"{name} is {getattr(config, name)!r}; it must be True or False, without quotes."
            )


def _check_sizes(config) -> None:
    for name in (
        "batch_size", "seq_length", "hidden_size", "num_layers", "num_heads", "n_kv_heads",
        "intermediate_size", "vocab_size", "block_size", "num_blocks", "max_position_embedding",
        "pp_interleave_num", "fine_grain_interleave", "max_documents",
    ):  # fmt: skip
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if config.hidden_size % config.num_heads:
        raise UsageError(
            f"hidden_size {config.hidden_size} is not divisible by num_heads {config.num_heads}; "
            "every head needs the same whole number of channels."
        )
    head_dim = config.hidden_size // config.num_heads
    if head_dim % 2:
        raise UsageError(
            f"head_dim (hidden_size / num_heads) is {head_dim}; rotary embedding needs an even one."
        )
    if config.num_heads % config.n_kv_heads:
        raise UsageError(
            f"num_heads {config.num_heads} is not divisible by n_kv_heads {config.n_kv_heads}; "
            "every key/value head serves the same number of query heads."
        )
    if config.use_past and config.seq_length % config.block_size:
        raise UsageError(
            f"seq_length {config.seq_length} is not divisible by block_size {config.block_size}, "
            "so its last tokens would have no block in the paged cache; change one of them."
        )


def _check_reals(config) -> None:
    for name, least in (("rms_norm_eps", "above 0"), ("theta", "above 0"), ("sigma", "0 or more")):
        value = getattr(config, name)
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if not (number > 0 or (number == 0 and least == "0 or more")) or math.isinf(number):
            raise UsageError(f"{name} is {value!r}; it must be a number {least}.")


def _check_prefill_chunk(config) -> None:
    chunk = config.prefill_chunk
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 0:
        raise UsageError(f"prefill_chunk is {chunk!r}; it must be a number of tokens, or 0 for no chunks.")
    if chunk and not (config.use_past and config.is_dynamic):
        raise UsageError(
            f"prefill_chunk is {chunk}, but use_past is {config.use_past} and is_dynamic is "
            f"{config.is_dynamic}; prompts are read in pieces with both alone. Set both to True, or "
            "prefill_chunk to 0."
        )


def _check_choices(config) -> None:
    _check_prefill_chunk(config)
    check_extension(config)
    check_sampling(vars(config))
    if config.attention_dropout_prob != 0.0:
        raise UsageError(
            f"attention_dropout_prob is {config.attention_dropout_prob}; attention runs "
            "without dropout (every TeleChat2 model was trained with 0.0). Set it to 0.0."
        )
    if any(not 0 <= token < config.vocab_size for token in config.document_start_ids):
        raise UsageError(
            f"document_start_ids is {config.document_start_ids}; ids lie between 0 and vocab_size - 1 = "
            f"{config.vocab_size - 1}."
        )
    for name in ("embed_dropout_prob", "hidden_dropout_prob"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise UsageError(f"{name} is {getattr(config, name)}; it must be in [0, 1).")
    if config.use_past and config.batch_size * config.seq_length > config.block_size * config.num_blocks:
        logger.warning(
            "The paged cache holds %d tokens, fewer than batch_size * seq_length = %d: long batches run out.",
            config.block_size * config.num_blocks,
            config.batch_size * config.seq_length,
        )


def _check_rest(config) -> None:
    """Refuse what this version would have to ignore."""
    if config.moe and config.hidden_dropout_prob:
        raise UsageError(
            f"hidden_dropout_prob is {config.hidden_dropout_prob}, but experts run without dropout; "
            "set it to 0.0."
        )
    for name in ("quantization_config", "quantization", "parallel_decoding_params", "pet_config"):
        if getattr(config, name, None):
            raise UsageError(f"model_config has {name}, which this version does not support; remove it.")


def feed_forward_width(hidden_size: int, multiplier: float | None, multiple_of: int) -> int:
    """Width of the feed-forward block where the config gives none (spec 1.2)."""
    width = 4 * hidden_size
    if multiplier is not None:
        width = int((multiplier + 0.01) * width)
    width = int(2 * width / 3)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)
