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
    """Rows on the right filled up to the longest.

    Args:
        rows: ids, at least one in each row.
        preferred: ids to pad with, the best first; those that cannot be are passed over.

    Returns:
        The array ``[B, longest]`` int32, and the id that it is padded with, which no row ends with.
    """
    last = {row[-1] for row in rows}
    padding = next(id for id in (*preferred, *range(len(last) + 1)) if _is_id(id) and id not in last)
    longest = max(map(len, rows))
    filled = [[*row, *[padding] * (longest - len(row))] for row in rows]
    return np.array(filled, np.int32), padding


def check_ids(rows: np.ndarray, lengths: Sequence[int], vocab_size: int) -> None:
    """Refuse ids that are no row of the embedding: MindSpore fails at them, and at every later step too.

    Args:
        rows: ``[B, longest]`` ids; beyond ``lengths`` they are padding, which may be anything.
        lengths: ``[B]``.
        vocab_size: rows of the embedding.

    Raises:
        UsageError: names the row, the position and the id.
    """
    inside = np.arange(rows.shape[1]) < np.asarray(lengths)[:, None]
    wrong = np.argwhere(inside & ((rows < 0) | (rows >= vocab_size)))
    if len(wrong):
        row, position = wrong[0]
        raise UsageError(
            f"prompt {row + 1} of {len(rows)} has the id {rows[row, position]} at position {position}, but "
            f"the model's vocab_size is {vocab_size}; encode it with the tokenizer of this model."
        )


def _is_id(value) -> bool:
    return isinstance(value, int) and value >= 0
