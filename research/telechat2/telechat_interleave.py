"""Fine-grained interleave: a layer's tokens in copies, so that one computes while another communicates.

Tensor parallelism communicates before and after each product, and the product waits. What is done to each
token by itself (norms, projections, feed-forward) is therefore done in n copies, each of 1/n of the tokens:
the communication of one can run beside the other's products, since neither needs anything of the other. Only
attention takes all tokens at once. Between attention and the next layer's attention nothing is joined.

The rule that model code knows no devices has its exception here: this structure is a parallel plan. A device
cuts and joins the tokens *that it holds*: no communication, and copy i is the i-th part of every device's
tokens. Attention finds each device's tokens in their order because the embedding starts with copies of the
token ids, and everything up to the last norm keeps to them. Between embedding, layers and norm, and where a
stage of the pipeline ends, the copies travel as one tensor.

MindSpore recognises copies by the attribute ``fine_grained_interleaved_index``, the number of a block, on the
operators at its borders: StridedSlice where it begins and Concat where it ends. Within a block it makes the
two copies' communication take turns. A block that ends with communication, or holds the embedding,
makes MindSpore 2.9 order the graph in a circle: embedding and last norm are in copies, but in no block.
"""

import logging

from mindspore import nn
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.config.parallel import copies_of
from research.telechat2.config.pipeline import partition_of, places
from research.telechat2.config.recompute import read_recompute
from research.telechat2.telechat_transformer import TelechatDecoderLayer

logger = logging.getLogger("telechat2")


class SplitTokens(nn.Cell):
    """``[T, …]`` to a tuple of ``copies`` tensors ``[T / copies, …]``.

    ``block`` is the number of the block that begins here, None if none does.
    """

    def __init__(self, copies, block=None):
        super().__init__()
        self.copies = copies
        self.slice = P.StridedSlice()
        _mark(self.slice, block)

    def construct(self, x):
        tokens, others = x.shape[0], x.shape[1:]
        begin, step = (0,) * len(others), (1,) * (len(others) + 1)
        parts = ()
        for i in range(self.copies):
            first, last = i * tokens // self.copies, (i + 1) * tokens // self.copies
            parts += (self.slice(x, (first, *begin), (last, *others), step),)
        return parts


class JoinTokens(nn.Cell):
    """A tuple of ``[T / copies, …]`` to one ``[T, …]``; ``block``: the number of the block that ends here."""

    def __init__(self, block=None):
        super().__init__()
        self.concat = P.Concat(0)
        _mark(self.concat, block)

    def construct(self, parts):
        return self.concat(parts)


def _mark(operator, block) -> None:
    if block is not None:
        operator.add_prim_attr("fine_grained_interleaved_index", block)


class TelechatInterleaveLayer(TelechatDecoderLayer):
    """A dense decoder layer on copies of the tokens; the same parameters and numbers as without.

    Takes and returns a tuple of ``[T / copies, H]``; in a run of layers on one stage the first takes, and the
    last returns, one tensor ``[T, H]`` of joined copies.

    Args:
        number: of the layer; None to mark no blocks, so that MindSpore orders nothing.
        splits, joins: whether it is the first and the last of its run.
    """

    def __init__(self, config, kernels, number, splits, joins):
        super().__init__(config, kernels)
        self.splits, self.joins = splits, joins
        copies = copies_of(config)
        # The block before attention ends with the queries; one mark is enough.
        self.join_query, self.join_key_value = JoinTokens(number), JoinTokens()
        self.split_attention = SplitTokens(copies, number)
        if splits:
            self.split_stage = SplitTokens(copies, number)
        if joins:
            self.join_stage = JoinTokens(None if number is None else number + 1)

    def construct(self, x, batch_size, inputs):
        """Whole sequences, see TelechatAttention."""
        if self.splits:
            x = self.split_stage(x)
        queries, keys_values = (), ()
        for part in x:
            normed = self.attention_norm(part)
            queries += (self.attention.wq(normed),)
            keys_values += (self.attention.wk_v(normed),)
        query, key_value = self.join_query(queries), self.join_key_value(keys_values)
        attention = self.split_attention(self.attention.attend(query, key_value, batch_size, inputs))
        out = ()
        for i in range(len(x)):
            out += (self._feed_forward(x[i], self.attention.wo(attention[i])),)
        return self.join_stage(out) if self.joins else out


def decoder_layers(config, kernels) -> list[TelechatDecoderLayer]:
    """The layers that a TelechatConfig asks for: plain, or interleaved with their runs' borders."""
    if copies_of(config) == 1:
        return [TelechatDecoderLayer(config, kernels) for _ in range(config.num_layers)]
    # With layers that are computed again as a whole, MindSpore 2.9 would order the graph in a circle too.
    ordered = not any(sum(row) for row in read_recompute(config).whole)
    if not ordered:
        logger.warning(
            "recompute_config.recompute is set: MindSpore cannot make the copies' communication take turns; "
            "whether it overlaps is left to the NPU's scheduler. select_recompute lets it."
        )
    runs = [(place.chunk, place.stage) for place in places(partition_of(config))]
    borders = [True, *(before != after for before, after in zip(runs, runs[1:], strict=False)), True]
    return [
        TelechatInterleaveLayer(config, kernels, i if ordered else None, borders[i], borders[i + 1])
        for i in range(config.num_layers)
    ]
