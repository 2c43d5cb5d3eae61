"""Rows of unlike lengths as one array, from which MindFormers' ``generate`` reads every length exactly.

It takes for a row's length what comes before the padding ids at its end. So the id that pads a batch must be
one that no row ends with, whatever YAML and config.json call the padding id: 0, -1, none, or that of the end.
"""

from collections.abc import Sequence

import numpy as np

from research.telechat2.common.errors import UsageError


class Rows(list):
    """Prompts as lists of ids, none of which is padding."""


def pad_rows(rows: Sequence[Sequence[int]], preferred: Sequence[int | None] = ()) -> tuple[np.ndarray, int]:
    """Rows, of at least one id each, filled up on the right: ``[B, longest]`` int32, and the padding id.

    ``preferred``: ids to pad with, the best first; what is no id or ends a row is passed over.
    """
    last = {row[-1] for row in rows}
    ids = (id for id in (*preferred, *range(len(last) + 1)) if isinstance(id, int) and id >= 0)
    padding = next(id for id in ids if id not in last)
    longest = max(map(len, rows))
    filled = [[*row, *[padding] * (longest - len(row))] for row in rows]
    return np.array(filled, np.int32), padding


def check_ids(rows: np.ndarray, lengths: Sequence[int], vocab_size: int) -> None:
    """UsageError for ids ``[B, longest]`` outside the embedding, at which MindSpore fails now and later.

    What lies beyond ``lengths`` ``[B]`` is padding, which may be anything.
    """
    inside = np.arange(rows.shape[1]) < np.asarray(lengths)[:, None]
    wrong = np.argwhere(inside & ((rows < 0) | (rows >= vocab_size)))
    if len(wrong):
        row, position = wrong[0]
        raise UsageError(
            f"prompt {row + 1} of {len(rows)}: id {rows[row, position]} at position {position} is outside "
            f"the model's vocab_size {vocab_size}; encode it with the tokenizer of this model."
        )
