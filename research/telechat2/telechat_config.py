"""TelechatConfig: every number that shapes a TeleChat2 model, checked when it is made."""

import mindspore as ms

from research.telechat2.compat.library import (
    MindFormerModuleType,
    MindFormerRegister,
    PretrainedConfig,
    default_transformer_config,
    moe_config_from,
    parallel_config_from,
)
from research.telechat2.config.kernel_limits import MAX_DOCUMENTS
from research.telechat2.config.model import (
    DTYPE_FIELDS,
    DTYPES,
    check_fields,
    complete,
    dtype_name,
    library_keys,
)
from research.telechat2.config.moe import MoESettings
from research.telechat2.config.parallel import check_plan


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
        max_position_embedding: length in tokens the model was trained at; None means ``training_seqlen``,
            else ``seq_length``. Less than ``seq_length`` needs an ``extend_method``.
        extend_method: how positions beyond the trained length are read, one of "None", "PI", "linear", "NTK",
            "YARN", "DYNAMIC_NTK": see model/rope.py. None (null): as the torch release, "DYNAMIC_NTK" if
            ``seq_length`` exceeds a ``training_seqlen`` that is given, else "None".
        scaling_factor: at least 1; what "PI" and "linear" divide positions by and "NTK" multiplies theta by.
            For "YARN" a section, see yarn_settings in config/rope.py.
        base_seqlen, training_seqlen: the release's lengths in tokens. Up to ``training_seqlen`` theta grows
            by dynamic_ntk's alpha of these two; beyond it only "DYNAMIC_NTK" goes on, see dynamic_ntk. None
            means ``max_position_embedding``: no growth up to there.
        extend_by_prompt: "DYNAMIC_NTK" chooses a request's factor by its prompt's length (True), or by the
            length that prompt and answer may reach (False).
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
        max_documents: documents in a packed record at most; Ascend's attention reads as many ends of each.
        use_past: predict with a paged key/value cache.
        qkv_concat: ParallelTelechatForCausalLM has one product for queries, keys and values, and in dense
            models one for gate and up.
        is_dynamic: with ``use_past``: one graph for all shapes (True), or one graph for each length
            rounded up to a power of two (False: faster steps, a compilation for each new length).
        block_size, num_blocks: tokens in a block of the paged cache, and number of blocks.
        prefill_chunk: with ``use_past``: most tokens of prompts read in one step; longer prompts are read in
            pieces, see generation/chunked_prefill.py. 0: every prompt at once.
        use_flash_attention: on Ascend the fused attention kernels (True) or plain operators (False).
        do_sample, temperature, top_k, top_p, repetition_penalty: defaults of ``generate``, see Sampling in
            generation/sampling.py.
        max_decode_length: most tokens of prompt and answer together, where a command sets no other limit;
            ``seq_length`` is one in any case.
        checkpoint_name_or_path: weights loaded when the model is built; "" for none.
        calculate_per_token_loss: return the loss as numerator and denominator (MindFormers' accumulation).
        offset: layers that stages of the pipeline have more than ``num_layers // stages``, see partition.
        pp_interleave_num: runs of layers, "virtual chunks", of each stage of the pipeline.
        fine_grain_interleave: copies of the tokens, 1 or 2, in which a layer is computed where
            ``model_parallel`` is above 1, so that one communicates beside the other's products: see
            telechat_interleave.py.
        disable_lazy_inline: compile a cluster's graph anew for every micro-batch. MindFormers' Trainer sets
            it where a step has only one.
        parallel_config: MindFormers' ``parallel_config`` section with its ``recompute``, see check_plan.
        moe_config: MindFormers' ``moe_config`` section; with ``expert_num`` above 1 every feed-forward block
            is a mixture of experts of width ``intermediate_size``, see MoESettings.

    Raises:
        UsageError: for an unknown key (the nearest known one is named), an unknown dtype or
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
        extend_method: str | None = None,
        scaling_factor: float | dict = 1.0,
        base_seqlen: int | None = None,
        training_seqlen: int | None = None,
        extend_by_prompt: bool = False,
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
        max_documents: int = MAX_DOCUMENTS,
        use_past: bool = False,
        qkv_concat: bool = False,
        is_dynamic: bool = True,
        block_size: int = 16,
        num_blocks: int = 512,
        prefill_chunk: int = 0,
        use_flash_attention: bool = True,
        top_k: int = 5,
        top_p: float = 1.0,
        do_sample: bool = False,
        temperature: float = 1.0,
        repetition_penalty: float = 1.0,
        max_decode_length: int = 512,
        checkpoint_name_or_path: str = "",
        calculate_per_token_loss: bool = False,
        offset: int | list = 0,
        pp_interleave_num: int = 1,
        fine_grain_interleave: int = 1,
        disable_lazy_inline: bool = False,
        parallel_config=default_transformer_config,
        moe_config=None,
        **kwargs,
    ):
        values = {k: v for k, v in locals().items() if k not in ("self", "kwargs") and not k.startswith("__")}
        super().__init__(**library_keys(kwargs, values))
        complete(values)
        for name in DTYPE_FIELDS:
            values[name] = _dtype(name, values[name])
        values["moe_config"] = moe_config_from(moe_config)
        values["parallel_config"] = parallel_config_from(parallel_config)
        for name, value in values.items():
            setattr(self, name, value)
        # The mixture of experts; None for a dense model.
        self.moe = MoESettings.read(self.moe_config, self.intermediate_size)
        check_fields(self)
        check_plan(self)

    def to_dict(self) -> dict:
        """MindFormers' dictionary of all fields; ``moe`` follows from them."""
        return {name: value for name, value in super().to_dict().items() if name != "moe"}

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def _dtype(name: str, value):
    if value in [getattr(ms, dtype) for dtype in DTYPES]:
        return value
    return getattr(ms, dtype_name(name, value))
