"""Which tokens of a packed record may see each other."""

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P  # noqa: N812


class DocumentMask(nn.Cell):
    """What a token of a packed record must not see: what follows it, and other documents.

    A document begins with one of ``start_ids`` and ends where the next begins. Rotary positions need no
    reset: attention depends on distances only.

    Inputs: tokens ``[B, S]`` int32. Output: ``[B, 1, S, S]`` bool, True where query i must not see key j.
    """

    def __init__(self, start_ids: list[int]):
        super().__init__()
        self.start_ids = Tensor(np.array(start_ids, np.int32).reshape(1, 1, -1))
        self.equal = P.Equal()
        self.sum = P.ReduceSum()
        self.cast = P.Cast()
        self.cumsum = P.CumSum()
        self.different = P.NotEqual()
        self.later = P.Greater()
        self.either = P.LogicalOr()

    def construct(self, tokens):
        batch, length = tokens.shape
        starts = self.cast(self.equal(tokens.reshape(batch, length, 1), self.start_ids), mstype.int32)
        document = self.cumsum(self.sum(starts, -1), 1)
        other = self.different(document.reshape(batch, 1, length, 1), document.reshape(batch, 1, 1, length))
        index = np.arange(length, dtype=np.int32)
        later = self.later(Tensor(index.reshape(1, 1, 1, length)), Tensor(index.reshape(1, 1, length, 1)))
        return self.either(other, later)
