"""What a TeleChat2 model's configuration may be: the rules beyond those of single settings.

TelechatConfig obeys them when it is made, and the check without MindSpore before that.
"""

import difflib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.fields import settings_of
from research.telechat2.config.kinds import check_divisible
from research.telechat2.config.model_settings import DTYPE_FIELDS, DTYPES, ModelSettings
from research.telechat2.config.moe import ExpertSection, MoESettings
from research.telechat2.config.parallel import check_plan
from research.telechat2.config.plan_settings import ParallelSettings
from research.telechat2.config.rope import check_extension, complete_extension
from research.telechat2.config.sampling import SAMPLING, check_sampling

logger = logging.getLogger("telechat2")

# Keys of older TeleChat2 YAMLs that have no effect: why, and the values that ask for nothing that this model
# does not do anyway; None: all values.
DEAD_KEYS: dict[str, tuple[str, tuple[object, ...] | None]] = {
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


_UNSUPPORTED = ("quantization_config", "quantization", "parallel_decoding_params", "pet_config")


def read_model(
    given: Mapping[str, Any], plan: ParallelSettings, experts: ExpertSection
) -> tuple[ModelSettings, dict[str, Any]]:
    """The settings of a model, complete and checked, and the keys of ``given`` that are MindFormers' own.

    Args:
        given: a YAML's ``model_config``, with anything that MindFormers adds to it.
        plan, experts: the sections that belong to it.

    Raises:
        UsageError: an unknown key (the nearest known one is named), an unknown dtype or ``extend_method``, or
            sizes or a plan that cannot be.
    """
    known = settings_of(ModelSettings)
    others = _library_keys({key: value for key, value in given.items() if key not in known}, known)
    own = {key: value for key, value in given.items() if key in known}
    config = ModelSettings(**own, parallel_config=plan, moe_config=experts)
    _complete(config)
    config.moe = MoESettings.read(experts, config.intermediate_size)
    _check_model(config)
    return config, others


def _library_keys(extra: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """``extra`` without keys that are not the model's; a key without effect is named in a warning.

    Raises:
        UsageError: a key is unknown, or asks for what this model does not do.
    """
    for key, value in extra.items():
        if key in DEAD_KEYS:
            reason, harmless = DEAD_KEYS[key]
            if harmless is not None and value not in harmless:
                raise UsageError(f"model_config has {key!r}: {value!r}, but {reason}. Remove it.")
            logger.warning("model_config.%s has no effect: %s.", key, reason)
        elif key in OTHERS_KEYS:
            raise UsageError(
                f"model_config has the key {key!r}, which this model does not have: {OTHERS_KEYS[key]}. "
                f"Remove {key}."
            )
        elif key in _UNSUPPORTED and value:
            raise UsageError(f"model_config has {key}, which this version does not support; remove it.")
        elif key not in LIBRARY_KEYS:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = (
                f"; did you mean {nearest[0]!r}?"
                if nearest
                else f"; known keys are {', '.join(sorted(known))}."
            )
            raise UsageError(f"model_config has the key {key!r}, which TelechatConfig does not know{hint}")
    left = ("model_type", *TRAINER_KEYS, *DEAD_KEYS)
    return {key: value for key, value in extra.items() if key not in left}


def _complete(config: ModelSettings) -> None:
    """Fill in what follows from other settings, and write dtypes as their names."""
    config.embedding_init_type = config.embedding_init_type or config.param_init_type
    if config.n_kv_heads is None:
        config.n_kv_heads = config.num_heads
    config.max_position_embedding = (
        config.max_position_embedding or config.training_seqlen or config.seq_length
    )
    config.document_start_ids = list(config.document_start_ids)
    complete_extension(config)
    if config.intermediate_size is None:
        config.intermediate_size = feed_forward_width(
            config.hidden_size, config.ffn_dim_multiplier, config.multiple_of
        )
    for name in DTYPE_FIELDS:
        dtype = str(getattr(config, name)).lower()  # MindSpore's dtype, or its name
        if dtype not in DTYPES:
            raise UsageError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(DTYPES)}.")
        setattr(config, name, dtype)


def _check_model(config: ModelSettings) -> None:
    """Refuse sizes that do not divide, unknown choices, and what this version would have to ignore."""
    own = [each for each in settings_of(ModelSettings).values() if each.name not in SAMPLING]
    choices = [(each.check, getattr(config, each.name)) for each in own if each.choices]
    check_all(*[(each.check, getattr(config, each.name)) for each in own if not each.choices])
    check_all((_check_division, config))
    check_all(*choices, (_check_choices, config), (_check_dropout, config), (check_plan, config))


def _check_division(config: ModelSettings) -> None:
    check_divisible("hidden_size", config.hidden_size, "num_heads", config.num_heads)
    if config.head_dim % 2:
        raise UsageError(
            f"head_dim (hidden_size / num_heads) is {config.head_dim}; rotary embedding needs an even one."
        )
    check_divisible("num_heads", config.num_heads, "n_kv_heads", config.n_kv_heads)
    if config.use_past:
        advice = "its last tokens would have no block in the paged cache; change one of them"
        check_divisible("seq_length", config.seq_length, "block_size", config.block_size, advice)


def _check_choices(config: ModelSettings) -> None:
    check_extension(config)
    check_sampling(vars(config))
    if (chunk := config.prefill_chunk) and not (config.use_past and config.is_dynamic):
        raise UsageError(
            f"prefill_chunk is {chunk}, but use_past is {config.use_past} and is_dynamic is "
            f"{config.is_dynamic}; prompts are read in chunks with both alone. Set both to True, or "
            "prefill_chunk to 0."
        )
    if any(not 0 <= token < config.vocab_size for token in config.document_start_ids):
        raise UsageError(
            f"document_start_ids is {config.document_start_ids}; ids lie between 0 and vocab_size - 1 = "
            f"{config.vocab_size - 1}."
        )
    if config.use_past and config.batch_size * config.seq_length > config.block_size * config.num_blocks:
        logger.warning(
            "The paged cache holds %d tokens, fewer than batch_size * seq_length = %d: long batches run out.",
            config.block_size * config.num_blocks,
            config.batch_size * config.seq_length,
        )


def _check_dropout(config: ModelSettings) -> None:
    if config.moe and config.hidden_dropout_prob:
        raise UsageError(
            f"hidden_dropout_prob is {config.hidden_dropout_prob}, but experts run without dropout; set it "
            "to 0.0."
        )


def feed_forward_width(hidden_size: int, multiplier: float | None, multiple_of: int) -> int:
    """Width of the feed-forward block where the config gives none (spec 1.2)."""
    width = 4 * hidden_size
    if multiplier is not None:
        width = int((multiplier + 0.01) * width)
    width = int(2 * width / 3)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)
