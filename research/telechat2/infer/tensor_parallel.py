"""Tensor parallelism of prediction: cells of a built model are exchanged for those of one of its processes.

A process ("rank") has its share of the heads, of the feed-forward width (of every expert's, too) and of the
vocabulary. Where a sum runs over what is shared, an all-reduce adds up the ranks' summands, so that all ranks
go on with the same numbers. Norms, router and biases are whole on every rank.
"""

from dataclasses import dataclass

import mindspore as ms
from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.common.errors import UsageError
from research.telechat2.compat.library import process_group
from research.telechat2.infer.telechat_transformers import join_products
from research.telechat2.telechat_layer import TelechatEmbedding, TelechatLinear


@dataclass(frozen=True)
class Ranks:
    """The ``size`` processes (n) that share a model; this one holds the ``rank``-th of n equal parts, from 0.

    ``group``: MindSpore's name of their communication group.
    """

    size: int
    rank: int
    group: str


def ranks_of(config) -> Ranks:
    """The ranks of ``parallel_config.model_parallel``; UsageError if another number of processes runs."""
    size = config.parallel_config.model_parallel
    processes, rank, group = process_group()
    if processes != size:
        raise UsageError(
            f"parallel_config.model_parallel is {size}, but the processes of this run are {processes}; start "
            f"{size} by scripts/msrun_launcher.sh with use_parallel True, or set it to {processes}."
        )
    return Ranks(size, rank, group)


def exchange_cells(model, config, ranks: Ranks) -> None:
    """Make a whole TelechatForCausalLM with a cache the part of one rank; parameters keep their names.

    Load the weights afterwards. Build the model under ``no_init_parameters``, or it first takes the memory of
    the whole.
    """
    if config.qkv_concat:
        join_products(model, config)
    if ranks.size > 1:
        decoder = model.model
        decoder.tok_embeddings = SharedEmbedding(config, ranks)
        decoder.paged_inputs = model.kernels.paged_inputs(config, ranks.size)
        for layer in decoder.layers:
            attention = layer.attention
            attention.num_heads //= ranks.size
            attention.n_kv_heads //= ranks.size
            attention.paged_attention = model.kernels.paged_attention(config, ranks.size)
            _share_linears(attention, "wo", config, ranks)
            if layer.has_experts:
                _share_experts(layer.feed_forward, config, ranks)
            else:
                _share_linears(layer.feed_forward, "w2", config, ranks)
        if config.tie_word_embeddings:
            model.lm_head.weight = decoder.tok_embeddings.embedding_weight
        else:
            _cut(model.lm_head, 0, config, ranks)
        model.lm_head.matmul = Gathered(model.lm_head.matmul, ranks)
    for name, parameter in model.parameters_and_names():
        parameter.name = name


def _share_linears(block, last: str, config, ranks: Ranks) -> None:
    """Cut the rows of a block's weights ``[out, in]``, but of its last linear the columns."""
    for name, linear in block.name_cells().items():
        if isinstance(linear, TelechatLinear):
            _cut(linear, int(name == last), config, ranks)
    linear = getattr(block, last)
    linear.matmul = Summed(linear.matmul, ranks)


def _share_experts(moe, config, ranks: Ranks) -> None:
    """Cut the width of every expert: ``[E, F, H]`` of w1 and w3, ``[E, H, F]`` of w2."""
    for weights, axis in ((moe.ffn.w1, 1), (moe.ffn.w3, 1), (moe.ffn.w2, 2)):
        _cut(weights, axis, config, ranks)
    experts = moe.dropless_block.experts
    experts.unpermute = Summed(experts.unpermute, ranks)


def _cut(cell, axis: int, config, ranks: Ranks, name: str = "weight") -> None:
    """Give ``cell`` a parameter ``name`` of one n-th of the size along ``axis``."""
    whole = getattr(cell, name)
    shape = list(whole.shape)
    shape[axis] //= ranks.size
    values = initializer(Normal(config.sigma, config.mean), shape, whole.dtype)
    setattr(cell, name, Parameter(values, name=whole.name))


class Summed(nn.Cell):
    """An operator (of a linear: before the bias) whose results ``[T, H]`` are summed over the ranks."""

    def __init__(self, operator, ranks: Ranks):
        super().__init__()
        self.operator = operator
        self.all_reduce = P.AllReduce(group=ranks.group)

    def construct(self, *operands):
        return self.all_reduce(self.operator(*operands))


class Gathered(nn.Cell):
    """A product whose results ``[T, V / n]`` are the ranks' columns; all of them ``[T, V]`` on every rank."""

    def __init__(self, matmul, ranks: Ranks):
        super().__init__()
        self.size = ranks.size
        self.matmul = matmul
        self.gather = P.AllGather(group=ranks.group)
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()

    def construct(self, x, weight):
        columns = self.matmul(x, weight)
        width = columns.shape[-1]
        parts = self.reshape(self.gather(columns), (self.size, -1, width))
        return self.reshape(self.transpose(parts, (1, 0, 2)), (-1, self.size * width))


class SharedEmbedding(TelechatEmbedding):
    """TelechatEmbedding of ``[V / n, H]``: each rank looks up its own ids, and an all-reduce adds them up.

    Token ids ``[...]`` to ``[..., H]``: all summands but one are zero, so the sum is exact.
    """

    def __init__(self, config, ranks: Ranks):
        super().__init__(config)
        _cut(self, 0, config, ranks, "embedding_weight")
        rows = config.vocab_size // ranks.size
        self.first, self.rows = ranks.rank * rows, rows
        self.both = P.LogicalAnd()
        self.expand = P.ExpandDims()
        self.all_reduce = P.AllReduce(group=ranks.group)

    def construct(self, tokens):
        index = tokens - self.first
        own = self.both(index >= 0, index < self.rows)
        index = index * self.cast(own, ms.int32)
        found = self.cast(self.gather(self.embedding_weight, index, 0), self.dtype)
        return self.all_reduce(found * self.expand(self.cast(own, self.dtype), -1))
