"""Which kernels a model gets: the fused ones on Ascend, their twins on a CPU. Chosen once, at construction.

A kernel's contract is stated at its twin (telechat_twins.py). Settings that the target's kernels cannot take
are errors here, since only here the target is known.
"""

import mindspore as ms
from mindspore import nn

from research.telechat2.telechat_compat import CrossEntropyLoss, OpParallelConfig, is_cpu
from research.telechat2.telechat_fused import (
    CausalAttentionFused,
    DroplessExpertsFused,
    PagedAttentionFused,
    PagedInputsFused,
    RMSNormFused,
    RotaryFused,
    RotaryTokensFused,
    SequenceInputsFused,
    SwiGLUFused,
)
from research.telechat2.telechat_moe_dispatch import CapacityExperts, DroplessExpertsTwin
from research.telechat2.telechat_twins import (
    CrossEntropyTwin,
    GroupedAttention,
    PagedAttentionTwin,
    PagedInputsTwin,
    RMSNormTwin,
    RotaryTokensTwin,
    RotaryTwin,
    SequenceInputsTwin,
    SwiGLUTwin,
)


def rms_norm(eps: float) -> nn.Cell:
    """RMSNorm kernel: ``(x [T, H], weight [H]) -> [T, H]``, computed in the dtype given."""
    return RMSNormTwin(eps) if is_cpu() else RMSNormFused(eps)


def swiglu() -> nn.Cell:
    """SwiGLU kernel: ``(gate [T, F], up [T, F]) -> [T, F]``."""
    return SwiGLUTwin() if is_cpu() else SwiGLUFused()


def rotary() -> nn.Cell:
    """Rotation of whole sequences: ``(q [B, N, S, D], k [B, K, S, D], (cos, sin), (cos, sin)) -> (q, k)``."""
    return RotaryTwin() if is_cpu() else RotaryFused()


def rotary_tokens(head_dim: int) -> nn.Cell:
    """Rotation of single tokens: ``(q [T, N*D], k [T, K*D], cos, sin [T, D], lengths [B]) -> (q, k)``."""
    return RotaryTokensTwin(head_dim) if is_cpu() else RotaryTokensFused(head_dim)


def sequence_inputs(config) -> nn.Cell:
    """What the kernels on whole sequences need besides their operands; see SequenceInputsTwin."""
    if is_cpu():
        _check_cpu_dtypes(config)
    elif config.use_flash_attention:
        return SequenceInputsFused()
    return SequenceInputsTwin(config.num_heads, config.n_kv_heads, config.softmax_compute_type)


def causal_attention(config) -> nn.Cell:
    """Training attention: ``(q [B, N, S, D], k, v [B, K, S, D], mask) -> [B, N, S, D]``."""
    if config.use_flash_attention and not is_cpu():
        _check_attention_dtype(config)
        if config.head_dim % 16:
            raise ValueError(
                f"head_dim is {config.head_dim}, but Ascend's FlashAttentionScore needs a multiple of 16; "
                "change hidden_size or num_heads, or set model_config.use_flash_attention: False."
            )
        return CausalAttentionFused(config.num_heads, config.head_dim, bool(config.document_start_ids))
    return GroupedAttention(config.head_dim, config.softmax_compute_type)


def paged_inputs(config) -> nn.Cell:
    """What paged attention needs besides its operands, made once for all layers; see PagedInputsTwin."""
    if is_cpu():
        _check_cpu_dtypes(config)
        return PagedInputsTwin(
            config.num_blocks, config.block_size, config.n_kv_heads, config.softmax_compute_type
        )
    _check_paged_kernels(config)
    return PagedInputsFused(config.compute_dtype)


def paged_attention(config) -> nn.Cell:
    """Prediction attention with its cache; see PagedAttentionTwin."""
    kind = PagedAttentionTwin if is_cpu() else PagedAttentionFused
    return kind(
        config.num_heads, config.n_kv_heads, config.head_dim, config.num_blocks, config.block_size,
        config.compute_dtype, config.softmax_compute_type,
    )  # fmt: skip


def reads_every_block() -> bool:
    """Whether paged attention reads all columns of the block tables, so that they are best cut to need."""
    return is_cpu()


def capacity_experts(config) -> nn.Cell:
    """The experts with a capacity, plain operators on every target; see CapacityExperts."""
    return CapacityExperts(config.moe, swiglu())


def dropless_experts(config) -> nn.Cell:
    """The experts without a capacity; see DroplessExpertsTwin."""
    kind = DroplessExpertsTwin if is_cpu() else DroplessExpertsFused
    return kind(config.moe, swiglu(), turned=config.use_past)


def cross_entropy(tokens: int = 1, vocabulary: int = 1) -> nn.Cell:
    """Cross entropy: ``(logits [T, V], labels [T], mask [T]) -> (sum [1], number of tokens [1])``.

    ``tokens`` and ``vocabulary``: how often a parallel plan splits T and V.
    """
    if is_cpu():
        return CrossEntropyTwin()
    return CrossEntropyLoss(OpParallelConfig(tokens, vocabulary), calculate_per_token_loss=True)


def _check_paged_kernels(config) -> None:
    """Raise ValueError for a config that Ascend's prediction kernels cannot run (CANN's operator lists)."""
    if not config.is_dynamic:
        raise ValueError(
            "is_dynamic is False, but Ascend's kernels read prompts one after the other without padding; "
            "set model_config.is_dynamic: True."
        )
    if not config.use_flash_attention:
        raise ValueError(
            "use_flash_attention is False, but prediction with a cache on Ascend has only the fused kernels; "
            "set model_config.use_flash_attention: True, or use_past: False."
        )
    _check_attention_dtype(config)
    if config.compute_dtype == ms.bfloat16 and config.rotary_dtype == ms.float32:
        raise ValueError(
            "rotary_dtype is float32 and compute_dtype bfloat16, but Ascend's ApplyRotaryPosEmb rotates "
            "bfloat16 by bfloat16 tables only; "
            "set model_config.rotary_dtype: bfloat16, or compute_dtype: float16."
        )
    if config.block_size % 16 or config.head_dim > 256:
        raise ValueError(
            f"block_size is {config.block_size} and head_dim {config.head_dim}; Ascend's PagedAttention "
            "needs a block_size that is a multiple of 16 and a head_dim of at most 256."
        )


def _check_attention_dtype(config) -> None:
    if config.compute_dtype == ms.float32:
        raise ValueError(
            "compute_dtype is float32, but Ascend's attention kernels take float16 or bfloat16; "
            "set model_config.compute_dtype to one of them."
        )


def _check_cpu_dtypes(config) -> None:
    """Raise ValueError for bfloat16 where a CPU has no kernels for it; ``res_dtype`` may be bfloat16."""
    for name in (
        "compute_dtype", "param_init_type", "embedding_init_type", "layernorm_compute_type",
        "softmax_compute_type", "rotary_dtype",
    ):  # fmt: skip
        if getattr(config, name) == ms.bfloat16:
            raise ValueError(
                f"{name} is bfloat16, for which MindSpore has no operators on a CPU; "
                f"set model_config.{name}: float32."
            )
