"""Which length's rotary factor a request has (DYNAMIC_NTK): chosen at its prefill, kept for its whole life.

The torch release computes the factor anew at every step and leaves the keys that are cached as they were, so
that queries and keys of one sequence disagree once it has grown over a threshold. Here all keys and queries
of a request share one factor, and an answer is that of a full forward pass with this factor.
"""

import numpy as np

from research.telechat2.common.errors import UsageError


class RequestLengths:
    """The lengths whose factors the live requests have, each kept by the first block of its cache.

    A request ends when its first block begins another. What is read later on, be it further pieces of the
    prompt or a request that shares the first blocks, has the factor those were read with.
    """

    def __init__(self, config):
        self.block_size, self.seq_length = config.block_size, config.seq_length
        self.by_prompt = config.extend_by_prompt
        self.by_first_block: dict[int, int] = {}

    def of_rows(self, begins, lengths, block_tables, *, longest=None) -> np.ndarray:
        """The length ``[B]`` int32 whose factor each row of a step has.

        Args:
            begins: whether the step reads a prompt from its beginning, of all rows or ``[B]`` of each.
            lengths: ``[B]``, tokens of each row.
            block_tables: ``[B, M]``, -1 where a row has no block; a row without any is padding of the batch.
            longest: ``[B]``, tokens that each row may reach, where the caller knows: needed at a request's
                prefill only. Without it those that the blocks reserved for it hold, or ``extend_by_prompt``.

        Raises:
            UsageError: a row goes on whose beginning was not seen.
        """
        lengths, tables = np.asarray(lengths), np.asarray(block_tables)
        firsts = tables[:, 0]
        if longest is None:
            longest = lengths if self.by_prompt else (tables >= 0).sum(1) * self.block_size
        longest = np.clip(longest, lengths, self.seq_length)
        for row in np.flatnonzero((firsts >= 0) & begins):
            self.by_first_block[int(firsts[row])] = int(longest[row])
        return np.array([self._kept(int(block)) for block in firsts], np.int32)

    def _kept(self, first_block: int) -> int:
        if first_block < 0:
            return 0
        if first_block not in self.by_first_block:
            raise UsageError(
                f"a request goes on whose first block is {first_block}, but no prefill began in that block, "
                f"so that its rotary factor (extend_method DYNAMIC_NTK) is unknown; read its prompt again."
            )
        return self.by_first_block[first_block]
