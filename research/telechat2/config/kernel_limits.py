"""Which configurations the kernels of Ascend and of a CPU can run: rules that need no MindSpore.

model/kernels/select.py obeys them when it chooses kernels, and telechat_plan.py's check before that.
"""

from research.telechat2.common.errors import UsageError
from research.telechat2.config.model_settings import ModelSettings

_KERNEL_DOCUMENTS = 1024  # CANN's description of the variable-length form


def check_fused_attention(config: ModelSettings) -> None:
    """Raise UsageError for a config that Ascend's FlashAttentionScore cannot train with."""
    _check_attention_dtype(config)
    documents = config.batch_size * config.max_documents if config.document_start_ids else 0
    if documents > _KERNEL_DOCUMENTS:
        raise UsageError(
            f"batch_size {config.batch_size} times max_documents {config.max_documents} is {documents}, but "
            f"Ascend's FlashAttentionScore takes {_KERNEL_DOCUMENTS} documents; lower one of the two."
        )
    head_dim = config.head_dim
    if head_dim % 16:
        raise UsageError(
            f"head_dim is {head_dim}, but Ascend's FlashAttentionScore needs a multiple of 16; change "
            "hidden_size or num_heads, or set model_config.use_flash_attention: False."
        )


def check_paged_kernels(config: ModelSettings) -> None:
    """Raise UsageError for a config that Ascend's prediction kernels cannot run (CANN's operator lists)."""
    if not config.is_dynamic:
        raise UsageError(
            "is_dynamic is False, but Ascend's kernels read prompts one after the other without padding; set "
            "model_config.is_dynamic: True."
        )
    if not config.use_flash_attention:
        raise UsageError(
            "use_flash_attention is False, but prediction with a cache on Ascend has only the fused kernels; "
            "set model_config.use_flash_attention: True, or use_past: False."
        )
    _check_attention_dtype(config)
    if _name(config.compute_dtype) == "bfloat16" and _name(config.rotary_dtype) == "float32":
        raise UsageError(
            "rotary_dtype is float32 and compute_dtype bfloat16, but Ascend's ApplyRotaryPosEmb rotates "
            "bfloat16 by bfloat16 tables only; set model_config.rotary_dtype: bfloat16, or compute_dtype: "
            "float16."
        )
    head_dim = config.head_dim
    if config.block_size % 16 or head_dim > 256:
        raise UsageError(
            f"block_size is {config.block_size} and head_dim {head_dim}; Ascend's PagedAttention needs a "
            "block_size that is a multiple of 16 and a head_dim of at most 256."
        )


def _check_attention_dtype(config: ModelSettings) -> None:
    if _name(config.compute_dtype) == "float32":
        raise UsageError(
            "compute_dtype is float32, but Ascend's attention kernels take float16 or bfloat16; set "
            "model_config.compute_dtype to one of them."
        )


def check_cpu_dtypes(config: ModelSettings) -> None:
    """Raise UsageError for bfloat16 where a CPU has no kernels for it; ``res_dtype`` may be bfloat16."""
    for name in (
        "compute_dtype", "param_init_type", "embedding_init_type", "layernorm_compute_type",
        "softmax_compute_type", "rotary_dtype",
    ):  # fmt: skip
        if _name(getattr(config, name)) == "bfloat16":
            raise UsageError(
                f"{name} is bfloat16, for which MindSpore has no operators on a CPU; set "
                f"model_config.{name}: float32."
            )


def _name(dtype: object) -> str:
    """``float32`` of MindSpore's dtype, or of its name."""
    return str(dtype).lower()
