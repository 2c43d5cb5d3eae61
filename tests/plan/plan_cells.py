"""Small cells for the dry run's tests; imported by the compiling process."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common import lazy_inline
from mindspore.common.initializer import initializer
from mindspore.ops import operations as P  # noqa: N812

TOKENS, HIDDEN, WIDTH = 16, 64, 256


class Linear(nn.Cell):
    """``x @ weight^T``."""

    def __init__(self, inputs, outputs, x_strategy, weight_strategy):
        super().__init__()
        self.weight = Parameter(initializer("normal", (outputs, inputs), ms.float16), name="weight")
        self.matmul = P.MatMul(transpose_b=True).shard((x_strategy, weight_strategy))

    def construct(self, x):
        return self.matmul(x, self.weight)


class Block(nn.Cell):
    """``x + down(relu(up(x)))``, ``up`` split by columns and ``down`` by rows."""

    def __init__(self, dp, mp):
        super().__init__()
        self.up = Linear(HIDDEN, WIDTH, (dp, 1), (mp, 1))
        self.relu = P.ReLU().shard(((dp, mp),))
        self.down = Linear(WIDTH, HIDDEN, (dp, mp), (1, mp))
        self.add = P.Add().shard(((dp, 1), (dp, 1)))

    def construct(self, x):
        return self.add(x, self.down(self.relu(self.up(x))))


class Blocks(nn.Cell):
    """As many blocks as asked, placed on the pipeline's stages, and the sum of all that they return."""

    def __init__(self, num_blocks, dp, mp, stages):
        super().__init__()
        self.blocks = nn.CellList([Block(dp, mp) for _ in range(num_blocks)])
        for i, block in enumerate(self.blocks):
            block.pipeline_stage = i * stages // num_blocks
        self.sum = P.ReduceSum().shard(((dp, 1),))

    def construct(self, x):
        for block in self.blocks:
            x = block(x)
        return self.sum(x)


class ReusedBlocks(Blocks):
    """Blocks that MindSpore compiles once for all micro-batches."""

    @lazy_inline
    def __init__(self, *arguments):
        super().__init__(*arguments)


def build(num_blocks=1, dp=2, mp=4, stages=1, micro_batches=1, reused=False, recompute=False, relu=None):
    """A training step of Blocks, and its input ``[micro_batches * TOKENS, HIDDEN]``.

    ``relu`` is another strategy of the activation than the one that fits.
    """
    network = (ReusedBlocks if reused else Blocks)(num_blocks, dp, mp, stages)
    for block in network.blocks:
        if recompute:
            block.recompute()
        if relu:
            block.relu.shard((tuple(relu),))
    optimizer = nn.AdamWeightDecay(network.trainable_params())
    if stages > 1:
        network = nn.PipelineCell(network, micro_batches)
    step = ms.amp.build_train_network(network, optimizer, level="O0")
    return step.set_train(), [Tensor(np.zeros((micro_batches * TOKENS, HIDDEN)), ms.float16)]


def build_nothing(message):
    """What a user's mistake looks like."""
    raise ValueError(message)


def build_crash():
    """A process that ends without a result."""
    import os

    os._exit(7)


def build_forever():
    """A process that does not end."""
    import time

    time.sleep(600)
