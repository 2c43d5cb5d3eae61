"""Which kernels a model gets: the fused ones on Ascend, their twins on a CPU. Chosen once, at construction.

A kernel's contract is stated at its twin (reference.py). Settings that the target's kernels cannot take
are errors here, by the rules of config/kernel_limits.py, since only here the target is known.
"""

from mindspore import nn

from research.telechat2.compat.library import CrossEntropyLoss, OpParallelConfig, is_cpu
from research.telechat2.config.kernel_limits import (
    check_cpu_dtypes,
    check_fused_attention,
    check_paged_kernels,
)
from research.telechat2.model.kernels.ascend import (
    CausalAttentionFused,
    DocumentAttentionFused,
    DroplessExpertsFused,
    PagedAttentionFused,
    PagedInputsFused,
    RMSNormFused,
    RotaryFused,
    RotaryTokensFused,
    SequenceInputsFused,
    SwiGLUFused,
    SwiGLUJoinedFused,
)
from research.telechat2.model.kernels.moe_dispatch import CapacityExperts, DroplessExpertsTwin
from research.telechat2.model.kernels.packed_documents import DocumentEnds, DocumentMask
from research.telechat2.model.kernels.reference import (
    CrossEntropyTwin,
    GroupedAttention,
    HeadsFirst,
    PagedAttentionTwin,
    PagedInputsTwin,
    RMSNormTwin,
    RotaryTokensTwin,
    RotaryTwin,
    SequenceInputsTwin,
    SwiGLUJoinedTwin,
    SwiGLUTwin,
)
from research.telechat2.model.tensor_parallel_group import ALONE


def rms_norm(eps: float) -> nn.Cell:
    """RMSNorm kernel: ``(x [T, H], weight [H]) -> [T, H]``, computed in the dtype given."""
    return RMSNormTwin(eps) if is_cpu() else RMSNormFused(eps)


def swiglu() -> nn.Cell:
    """SwiGLU kernel: ``(gate [T, F], up [T, F]) -> [T, F]``."""
    return SwiGLUTwin() if is_cpu() else SwiGLUFused()


def swiglu_joined() -> nn.Cell:
    """SwiGLU of the gate's and up's channels in one tensor: ``gate_up [T, 2F] -> [T, F]``."""
    return SwiGLUJoinedTwin() if is_cpu() else SwiGLUJoinedFused()


def rotary() -> nn.Cell:
    """Rotation of whole sequences: ``(q [B, S, N, D], k [B, S, K, D], (cos, sin), (cos, sin)) -> (q, k)``."""
    return RotaryTwin() if is_cpu() else RotaryFused()


def rotary_tokens(head_dim: int) -> nn.Cell:
    """Rotation of single tokens: ``(q [T, N*D], k [T, K*D], cos, sin [T, D], lengths [B]) -> (q, k)``."""
    return RotaryTokensTwin(head_dim) if is_cpu() else RotaryTokensFused(head_dim)


def sequence_inputs(config) -> nn.Cell:
    """What the kernels on whole sequences need besides their operands; see SequenceInputsTwin."""
    if is_cpu():
        check_cpu_dtypes(config)
    elif config.use_flash_attention:
        return SequenceInputsFused()
    return SequenceInputsTwin(config.num_heads, config.n_kv_heads, config.softmax_compute_type)


def causal_attention(config) -> nn.Cell:
    """Training attention: ``(q [B, S, N, D], k, v [B, S, K, D], mask)`` to q's shape or ``[B*S, N, D]``."""
    if not config.use_flash_attention or is_cpu():
        return HeadsFirst(GroupedAttention(config.head_dim, config.softmax_compute_type))
    check_fused_attention(config)
    if attends_by_ends(config):
        return DocumentAttentionFused(config.num_heads, config.head_dim)
    masked = bool(config.document_start_ids)
    return HeadsFirst(CausalAttentionFused(config.num_heads, config.head_dim, masked))


def documents(config) -> nn.Cell:
    """How attention learns of packed documents, from tokens ``[B, S]``: DocumentMask or DocumentEnds."""
    if attends_by_ends(config):
        return DocumentEnds(config.document_start_ids, config.max_documents)
    return DocumentMask(config.document_start_ids)


def attends_by_ends(config) -> bool:
    """Whether packed documents are kept apart by their ends: the fused kernel, on whole sequences."""
    fused = config.use_flash_attention and not is_cpu()
    return fused and bool(config.document_start_ids) and config.parallel_config.context_parallel == 1


def paged_inputs(config, ranks=ALONE) -> nn.Cell:
    """What paged attention needs besides its operands, made once for all layers; see PagedInputsTwin.

    ``ranks``: the Ranks that share the heads.
    """
    if is_cpu():
        check_cpu_dtypes(config)
        heads = config.n_kv_heads // ranks.size
        return PagedInputsTwin(config.num_blocks, config.block_size, heads, config.softmax_compute_type)
    check_paged_kernels(config)
    return PagedInputsFused(config.compute_dtype)


def paged_attention(config, ranks=ALONE) -> nn.Cell:
    """Prediction attention with its cache; see PagedAttentionTwin.

    ``ranks``: the Ranks that share the heads.
    """
    kind = PagedAttentionTwin if is_cpu() else PagedAttentionFused
    return kind(
        config.num_heads // ranks.size, config.n_kv_heads // ranks.size, config.head_dim, config.num_blocks,
        config.block_size, config.compute_dtype, config.softmax_compute_type,
    )  # fmt: skip


def reads_every_block() -> bool:
    """Whether paged attention reads all columns of the block tables, so that they are best cut to need."""
    return is_cpu()


def capacity_experts(config) -> nn.Cell:
    """The experts with a capacity, plain operators on every target; see CapacityExperts."""
    return CapacityExperts(config.moe, swiglu())


def dropless_experts(config, ranks=ALONE) -> nn.Cell:
    """The experts without a capacity; see DroplessExpertsTwin.

    ``ranks``: the Ranks that share their width.
    """
    kind = DroplessExpertsTwin if is_cpu() else DroplessExpertsFused
    return kind(config.moe, swiglu(), turned=config.use_past, ranks=ranks)


def cross_entropy(tokens: int = 1, vocabulary: int = 1) -> nn.Cell:
    """Cross entropy: ``(logits [T, V], labels [T], mask [T]) -> (sum [1], number of tokens [1])``.

    ``tokens`` and ``vocabulary``: how often a parallel plan splits T and V.
    """
    if is_cpu():
        return CrossEntropyTwin()
    return CrossEntropyLoss(OpParallelConfig(tokens, vocabulary), calculate_per_token_loss=True)
