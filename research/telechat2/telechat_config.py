"""TelechatConfig: every number that shapes a TeleChat2 model, checked when it is made."""

import difflib

import mindspore as ms

from research.telechat2.checkpoint.sizes import feed_forward_width
from research.telechat2.telechat_compat import (
    TRAINER_KEYS,
    MindFormerModuleType,
    MindFormerRegister,
    PretrainedConfig,
    default_transformer_config,
    logger,
    moe_config_from,
    parallel_config_from,
)
from research.telechat2.telechat_moe_config import MoESettings
from research.telechat2.telechat_parallel_config import check_plan

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}
EXTEND_METHODS = ("None", "PI", "NTK")
# Keys of older TeleChat2 YAMLs that never had an effect: accepted there, refused here with the reason.
DEAD_KEYS = {
    "pretrain_seqlen": "nothing ever read it; max_position_embedding is the length the model was trained at",
    "use_past_shard": "nothing ever read it",
    "use_rope_slice": "the rotary operators are chosen by the target",
    "use_attn_mask_compression": "the causal mask is always compressed",
    "hidden_act": "TeleChat2 is SwiGLU throughout",
    "out_proj_has_bias": "every TeleChat2 model has a bias on wo and w2",
    "qkv_has_bias": "no TeleChat2 model has a bias on wq and wk_v",
    "parallel_optimizer": "the section `parallel` decides on that",
}


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class TelechatConfig(PretrainedConfig):
    """Sizes, dtypes and decoding defaults of a TeleChat2 model.

    Args:
        batch_size: rows of a prediction batch; training takes ``runner_config.batch_size``.
        seq_length: longest sequence in tokens; training records hold ``seq_length + 1`` ids.
        hidden_size: width H of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads; ``head_dim = hidden_size / num_heads``.
        n_kv_heads: key/value heads, a divisor of ``num_heads``; None means one per query head.
        intermediate_size: width F of the feed-forward block. None derives it from
            ``ffn_dim_multiplier`` and ``multiple_of``: ``m = int((ffn_dim_multiplier + 0.01)·4H)``,
            ``F = int(2m/3)`` rounded up to ``multiple_of``; without a multiplier ``m = 4H``.
        ffn_dim_multiplier, multiple_of: see ``intermediate_size``.
        vocab_size: rows V of embedding and output projection.
        tie_word_embeddings: the output projection is the embedding (TeleChat v1 7B).
        rms_norm_eps: epsilon inside the root of RMSNorm.
        theta: base of the rotary frequencies.
        max_position_embedding: length in tokens the model was trained at; None means ``seq_length``. Less
            than ``seq_length`` needs an ``extend_method``.
        extend_method: how positions beyond the trained length are read, one of "None", "PI", "NTK".
        scaling_factor: factor of "PI" (positions are divided by it) and "NTK" (theta is multiplied by it).
        embed_dropout_prob, hidden_dropout_prob: dropout after the embedding, and after ``wo`` and ``w2``.
        attention_dropout_prob: 0.0; attention runs without dropout.
        compute_dtype: dtype of matrix products; "float32", "float16" or "bfloat16" like all below.
        param_init_type: dtype of parameters. embedding_init_type: of the embedding, None means the same.
        layernorm_compute_type: dtype in which norms are computed, and of their weights.
        softmax_compute_type: dtype of attention's softmax; Ascend's fused kernels always take float32.
        rotary_dtype: dtype in which rotations are computed. res_dtype: dtype of the residual stream.
        sigma, mean: normal initialisation of embedding and linears. The output projection uses 0.01.
        bos_token_id, eos_token_id, pad_token_id: special ids; ``pad_token_id`` -1 means there is none.
        ignore_token_id: label that is not trained.
        document_start_ids: ids that begin a document in packed training records, which then sees nothing of
            the others: every record gives the losses of its documents alone. Empty: one causal sequence.
        use_past: predict with a paged key/value cache.
        is_dynamic: with ``use_past``: one graph for all shapes (True), or one graph for each length
            rounded up to a power of two (False: faster steps, a compilation for each new length).
        block_size, num_blocks: tokens in a block of the paged cache, and number of blocks.
        use_flash_attention: on Ascend the fused attention kernels (True) or plain operators (False).
        top_k, top_p, do_sample, repetition_penalty: defaults of ``generate``.
        max_decode_length: most tokens of prompt and answer together, where a command sets no other limit;
            ``seq_length`` is one in any case.
        checkpoint_name_or_path: weights loaded when the model is built; "" for none.
        calculate_per_token_loss: return the loss as numerator and denominator (MindFormers' accumulation).
        offset: layers that stages of the pipeline have more than ``num_layers // stages``, see partition.
        pp_interleave_num: runs of layers, "virtual chunks", of each stage of the pipeline.
        parallel_config: MindFormers' ``parallel_config`` section with its ``recompute``, see check_plan.
        moe_config: MindFormers' ``moe_config`` section; with ``expert_num`` above 1 every feed-forward block
            is a mixture of experts of width ``intermediate_size``, see MoESettings.

    Raises:
        ValueError: for an unknown key (the nearest known one is named), an unknown dtype or
            ``extend_method``, or sizes that do not divide.
    """

    model_type = "telechat"

    def __init__(
        self,
        batch_size: int = 1,
        seq_length: int = 8192,
        hidden_size: int = 4096,
        num_layers: int = 30,
        num_heads: int = 32,
        n_kv_heads: int | None = None,
        intermediate_size: int | None = None,
        ffn_dim_multiplier: float | None = None,
        multiple_of: int = 256,
        vocab_size: int = 131072,
        tie_word_embeddings: bool = False,
        rms_norm_eps: float = 1e-5,
        theta: float = 10000.0,
        max_position_embedding: int | None = None,
        extend_method: str = "None",
        scaling_factor: float = 1.0,
        embed_dropout_prob: float = 0.0,
        hidden_dropout_prob: float = 0.0,
        attention_dropout_prob: float = 0.0,
        compute_dtype: str = "bfloat16",
        param_init_type: str = "float32",
        embedding_init_type: str | None = None,
        layernorm_compute_type: str = "float32",
        softmax_compute_type: str = "float32",
        rotary_dtype: str = "float32",
        res_dtype: str = "float32",
        sigma: float = 0.0048,
        mean: float = 0.0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 3,
        ignore_token_id: int = -100,
        document_start_ids: tuple[int, ...] | list[int] = (),
        use_past: bool = False,
        is_dynamic: bool = True,
        block_size: int = 16,
        num_blocks: int = 512,
        use_flash_attention: bool = True,
        top_k: int = 5,
        top_p: float = 1.0,
        do_sample: bool = False,
        repetition_penalty: float = 1.0,
        max_decode_length: int = 512,
        checkpoint_name_or_path: str = "",
        calculate_per_token_loss: bool = False,
        offset: int | list = 0,
        pp_interleave_num: int = 1,
        parallel_config=default_transformer_config,
        moe_config=None,
        **kwargs,
    ):
        values = {k: v for k, v in locals().items() if k not in ("self", "kwargs") and not k.startswith("__")}
        super().__init__(**_library_keys(kwargs, values))
        for name in _DTYPE_FIELDS:
            if values[name] is not None:
                values[name] = _dtype(name, values[name])
        values["embedding_init_type"] = values["embedding_init_type"] or values["param_init_type"]
        values["n_kv_heads"] = num_heads if n_kv_heads is None else n_kv_heads
        values["max_position_embedding"] = max_position_embedding or seq_length
        values["document_start_ids"] = list(document_start_ids)
        values["moe_config"] = moe_config_from(moe_config)
        values["extend_method"] = str(extend_method)
        values["parallel_config"] = parallel_config_from(parallel_config)
        if intermediate_size is None:
            values["intermediate_size"] = feed_forward_width(hidden_size, ffn_dim_multiplier, multiple_of)
        for name, value in values.items():
            setattr(self, name, value)
        _check_sizes(self)
        _check_choices(self)
        _check_rest(self)
        check_plan(self)

    @property
    def moe(self) -> MoESettings | None:
        """The mixture of experts; None for a dense model."""
        return MoESettings.read(self.moe_config, self.intermediate_size)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


_DTYPE_FIELDS = (
    "compute_dtype",
    "param_init_type",
    "embedding_init_type",
    "layernorm_compute_type",
    "softmax_compute_type",
    "rotary_dtype",
    "res_dtype",
)
# What MindFormers' PretrainedConfig, its Trainer and its YAML reader set besides the model's own fields.
_LIBRARY_KEYS = (
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
    "disable_lazy_inline",
    *TRAINER_KEYS,
)


def _library_keys(extra: dict, known: dict) -> dict:
    """``extra`` without keys that are not the model's; raises ValueError for one that nobody knows."""
    for key in extra:
        if key in DEAD_KEYS:
            raise ValueError(
                f"model_config has the key {key!r}, which has no effect: {DEAD_KEYS[key]}. Remove it."
            )
        if key not in _LIBRARY_KEYS:
            nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
            hint = (
                f"; did you mean {nearest[0]!r}?"
                if nearest
                else f"; known keys are {', '.join(sorted(known))}."
            )
            raise ValueError(f"model_config has the key {key!r}, which TelechatConfig does not know{hint}")
    return {k: v for k, v in extra.items() if k not in ("model_type", *TRAINER_KEYS)}


def _dtype(name: str, value):
    if value in DTYPES.values():
        return value
    if str(value).lower() not in DTYPES:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[str(value).lower()]


def _check_sizes(config: TelechatConfig) -> None:
    for name in (
        "batch_size", "seq_length", "hidden_size", "num_layers", "num_heads", "n_kv_heads",
        "intermediate_size", "vocab_size", "block_size", "num_blocks", "max_position_embedding",
        "pp_interleave_num",
    ):  # fmt: skip
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not divisible by num_heads {config.num_heads}; "
            "every head needs the same whole number of channels."
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim (hidden_size / num_heads) is {config.head_dim}; rotary embedding needs an even one."
        )
    if config.num_heads % config.n_kv_heads:
        raise ValueError(
            f"num_heads {config.num_heads} is not divisible by n_kv_heads {config.n_kv_heads}; "
            "every key/value head serves the same number of query heads."
        )
    if config.use_past and config.seq_length % config.block_size:
        raise ValueError(
            f"seq_length {config.seq_length} is not divisible by block_size {config.block_size}, "
            "so its last tokens would have no block in the paged cache; change one of them."
        )


def _check_choices(config: TelechatConfig) -> None:
    if config.extend_method not in EXTEND_METHODS:
        raise ValueError(
            f"extend_method is {config.extend_method!r}; it must be one of {', '.join(EXTEND_METHODS)}."
        )
    if config.extend_method == "None" and config.scaling_factor != 1.0:
        raise ValueError(
            f"scaling_factor is {config.scaling_factor}, but extend_method is 'None' and would ignore it; "
            "choose an extend_method or leave scaling_factor at 1.0."
        )
    if config.extend_method == "None" and config.max_position_embedding < config.seq_length:
        raise ValueError(
            f"seq_length {config.seq_length} exceeds max_position_embedding "
            f"{config.max_position_embedding}, the length the model was trained at; "
            "choose an extend_method, or change one of the two."
        )
    if config.attention_dropout_prob != 0.0:
        raise ValueError(
            f"attention_dropout_prob is {config.attention_dropout_prob}; attention runs "
            "without dropout (every TeleChat2 model was trained with 0.0). Set it to 0.0."
        )
    if any(not 0 <= token < config.vocab_size for token in config.document_start_ids):
        raise ValueError(
            f"document_start_ids is {config.document_start_ids}; ids lie between 0 and vocab_size - 1 = "
            f"{config.vocab_size - 1}."
        )
    for name in ("embed_dropout_prob", "hidden_dropout_prob"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be in [0, 1).")
    if config.use_past and config.batch_size * config.seq_length > config.block_size * config.num_blocks:
        logger.warning(
            "The paged cache holds %d tokens, fewer than batch_size * seq_length = %d: long batches run out.",
            config.block_size * config.num_blocks,
            config.batch_size * config.seq_length,
        )


def _check_rest(config: TelechatConfig) -> None:
    """Refuse what this version would have to ignore."""
    if config.moe and config.hidden_dropout_prob:
        raise ValueError(
            f"hidden_dropout_prob is {config.hidden_dropout_prob}, but experts run without dropout; "
            "set it to 0.0."
        )
    for name in ("quantization_config", "quantization", "parallel_decoding_params", "pet_config"):
        if getattr(config, name, None):
            raise ValueError(f"model_config has {name}, which this version does not support; remove it.")
