"""Which tokens of a packed record may see each other."""

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P  # noqa: N812


class Documents(nn.Cell):
    """The number of each token's document among those of its record, counted from that of its first token.

    A document begins with one of ``start_ids`` and ends where the next begins. Rotary positions need no
    reset: attention depends on distances only.

    Inputs: tokens ``[B, S]`` int32. Output: ``[B, S]`` int32.
    """

    def __init__(self, start_ids: list[int]):
        super().__init__()
        self.start_ids = Tensor(np.array(start_ids, np.int32).reshape(1, 1, -1))
        self.equal = P.Equal()
        self.sum = P.ReduceSum()
        self.cast = P.Cast()
        self.cumsum = P.CumSum()
        self.slice = P.StridedSlice()
        self.sub = P.Sub()

    def construct(self, tokens):
        batch, length = tokens.shape
        starts = self.cast(self.equal(tokens.reshape(batch, length, 1), self.start_ids), mstype.int32)
        number = self.cumsum(self.sum(starts, -1), 1)
        return self.sub(number, self.slice(number, (0, 0), (batch, 1), (1, 1)))


class DocumentMask(nn.Cell):
    """What a token of a packed record must not see: what follows it, and other documents.

    Inputs: tokens ``[B, S]`` int32. Output: ``[B, 1, S, S]`` bool, True where query i must not see key j.
    """

    def __init__(self, start_ids: list[int]):
        super().__init__()
        self.documents = Documents(start_ids)
        self.different = P.NotEqual()
        self.later = P.Greater()
        self.either = P.LogicalOr()

    def construct(self, tokens):
        batch, length = tokens.shape
        document = self.documents(tokens)
        other = self.different(document.reshape(batch, 1, length, 1), document.reshape(batch, 1, 1, length))
        index = np.arange(length, dtype=np.int32)
        later = self.later(Tensor(index.reshape(1, 1, 1, length)), Tensor(index.reshape(1, 1, length, 1)))
        return self.either(other, later)


class CumulativeLengths(nn.Cell):
    """The cumulative lengths of packed documents, if all tokens of a device lie one after the other.

    Every record has ``max_documents`` entries. The last one, and those that are left over, are the record's
    own end. ``parts`` devices share the records; a plan sets it.

    Inputs: tokens ``[B, S]`` int32. Output: ``[B * max_documents]`` int64, for each device not decreasing.
    """

    def __init__(self, start_ids: list[int], max_documents: int):
        super().__init__()
        self.documents = Documents(start_ids)
        numbers = np.arange(max_documents, dtype=np.int32)
        numbers[-1] = np.iinfo(np.int32).max
        self.numbers = Tensor(numbers.reshape(1, -1, 1))
        self.parts = 1
        self.beyond = P.Greater()
        self.cast = P.Cast()
        self.sum = P.ReduceSum()
        self.sub = P.Sub()

    def construct(self, tokens):
        batch, length = tokens.shape
        later = self.beyond(self.documents(tokens).reshape(batch, 1, length), self.numbers)
        # In one axis before the sum, whose strategy places them: after it MindSpore would guess.
        tokens_after = self.sum(self.cast(later, mstype.int32).reshape(-1, length), -1)
        record = np.arange(tokens_after.size) // later.shape[1] % (batch // self.parts)
        return self.sub(Tensor((record + 1) * length), self.cast(tokens_after, mstype.int64))
