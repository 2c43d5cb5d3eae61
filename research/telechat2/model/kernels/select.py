"""The kernels of a target: fused ones on Ascend, reference implementations on a CPU.

A model chooses them once, by ``choose_kernels``, and passes the object to the cells that use it. This is the
only file of the model that knows the target.
"""

from mindspore import nn

from research.telechat2.compat.library import CrossEntropyLoss, OpParallelConfig, is_cpu
from research.telechat2.config.kernel_limits import (
    check_cpu_dtypes,
    check_fused_attention,
    check_paged_kernels,
)
from research.telechat2.model.kernels import ascend, moe_dispatch, reference
from research.telechat2.model.kernels.packed_documents import CumulativeLengths, DocumentMask


class ReferenceKernels:
    """Plain operators, which every target has.

    Every member but ``reads_every_block`` makes a cell. The cells have these inputs and outputs; reference.py
    and moe_dispatch.py explain them:

    - ``rms_norm(eps)``: x ``[T, H]``, weight ``[H]`` to ``[T, H]``, in the dtype of x.
    - ``swiglu()``: gate and up ``[T, F]`` to ``[T, F]``.
    - ``swiglu_joined()``: gate's and up's channels in one tensor ``[T, 2F]`` to ``[T, F]``.
    - ``rotary()``: queries ``[B, S, N, D]``, keys ``[B, S, K, D]``, for each a pair (cos, sin); both rotated.
    - ``rotary_tokens(head_dim)``: queries ``[T, N*D]``, keys ``[T, K*D]``, cos and sin ``[T, D]``, lengths
      ``[B]``; both rotated.
    - ``sequence_inputs(config)``: tables and mask of whole sequences for ``rotary`` and ``causal_attention``.
    - ``causal_attention(config)``: queries ``[B, S, N, D]``, keys and values ``[B, S, K, D]``, mask, to
      ``[B, S, N, D]`` or ``[B*S, N, D]``.
    - ``documents(config)``: tokens ``[B, S]`` to what attention must know of packed documents.
    - ``paged_inputs(config, parts)``, ``paged_attention(config, parts)``: attention with a paged cache;
      ``parts``: into how many processes the heads are split.
    - ``top_k(num_experts, k)``: probabilities ``[T, E]`` to the k largest, numbers ``[T, k]`` and one-hot.
    - ``capacity_experts(config)``, ``dropless_experts(config)``: tokens ``[T, H]`` to the experts' outputs.
    - ``cross_entropy(tokens, vocabulary)``: logits ``[T, V]``, labels and mask ``[T]`` to the sum ``[1]`` and
      the number of tokens ``[1]``; the arguments say how often a parallel plan splits T and V.
    """

    reads_every_block = True  # attention reads all columns of the block tables: cut those nobody needs
    rms_norm = reference.RMSNormReference
    swiglu = reference.SwiGLUReference
    swiglu_joined = reference.SwiGLUJoinedReference
    rotary = reference.RotaryReference
    rotary_tokens = reference.RotaryTokensReference
    sequence_inputs = reference.SequenceInputsReference
    paged_inputs = reference.PagedInputsReference
    paged_attention = reference.PagedAttentionReference
    top_k = moe_dispatch.TopKReference
    grouped_experts = moe_dispatch.DroplessExpertsReference

    def has_variable_length(self, config) -> bool:
        """Whether attention takes packed documents by their cumulative lengths, not by a mask."""
        return False

    def causal_attention(self, config) -> nn.Cell:
        """See the class."""
        return reference.HeadsFirst(reference.GroupedAttention(config.head_dim, config.softmax_compute_type))

    def documents(self, config) -> nn.Cell:
        """See the class."""
        return DocumentMask(config.document_start_ids)

    def capacity_experts(self, config) -> nn.Cell:
        """See the class; plain operators on every target."""
        return moe_dispatch.CapacityExperts(config.moe, self.swiglu())

    def dropless_experts(self, config) -> nn.Cell:
        """See the class."""
        return self.grouped_experts(config.moe, self.swiglu(), transposed=config.use_past)

    def cross_entropy(self, tokens: int = 1, vocabulary: int = 1) -> nn.Cell:
        """See the class."""
        return reference.CrossEntropyReference()


class AscendKernels(ReferenceKernels):
    """Ascend's fused kernels, with plain operators for attention where ``use_flash_attention`` is False."""

    reads_every_block = False
    rms_norm = ascend.RMSNormFused
    swiglu = ascend.SwiGLUFused
    swiglu_joined = ascend.SwiGLUJoinedFused
    rotary = ascend.RotaryFused
    rotary_tokens = ascend.RotaryTokensFused
    paged_inputs = ascend.PagedInputsFused
    paged_attention = ascend.PagedAttentionFused
    top_k = ascend.TopKFused
    grouped_experts = ascend.DroplessExpertsFused

    def has_variable_length(self, config) -> bool:
        """Context parallelism splits sequences, so it needs the mask."""
        packed = config.use_flash_attention and bool(config.document_start_ids)
        return packed and config.parallel_config.context_parallel == 1

    def sequence_inputs(self, config) -> nn.Cell:
        """See the class."""
        return ascend.SequenceInputsFused() if config.use_flash_attention else super().sequence_inputs(config)

    def causal_attention(self, config) -> nn.Cell:
        """See the class."""
        if not config.use_flash_attention:
            return super().causal_attention(config)
        if self.has_variable_length(config):
            return ascend.DocumentAttentionFused(config.num_heads, config.head_dim)
        masked = bool(config.document_start_ids)
        return reference.HeadsFirst(ascend.CausalAttentionFused(config.num_heads, config.head_dim, masked))

    def documents(self, config) -> nn.Cell:
        """See the class."""
        if self.has_variable_length(config):
            return CumulativeLengths(config.document_start_ids, config.max_documents)
        return super().documents(config)

    def cross_entropy(self, tokens: int = 1, vocabulary: int = 1) -> nn.Cell:
        """MindFormers' loss, the one that can be split by the vocabulary."""
        return CrossEntropyLoss(OpParallelConfig(tokens, vocabulary), calculate_per_token_loss=True)


def choose_kernels(config) -> ReferenceKernels:
    """The kernels of the target that MindSpore's context names.

    Raises:
        UsageError: they cannot run this TelechatConfig, see config/kernel_limits.py.
    """
    if is_cpu():
        check_cpu_dtypes(config)
        return ReferenceKernels()
    if config.use_past:
        check_paged_kernels(config)
    elif config.use_flash_attention:
        check_fused_attention(config)
    return AscendKernels()
