"""Chunked prefill: long prompts are read in pieces, so that the memory of a step does not grow with them.

A prompt's first piece is an ordinary prefill. A later one is a decode step in which every token is a row of
its own, with the blocks of its request and the tokens up to itself for its length: all keys of a step are in
the cache before the first is read. So it takes no graph or kernel that prediction does not have anyway, and
pieces of several prompts may stand in one step. Its price is that every token reads the cache for itself.
"""

import numpy as np
from mindspore import Tensor


def pieces(lengths, chunk: int) -> list[tuple[bool, list[tuple[int, int, int]]]]:
    """The steps that read prompts of ``lengths`` tokens, each of at most ``chunk`` tokens.

    Returns:
        Of each step whether it is a prefill, and its pieces ``(row, start, stop)``. A row's pieces come in
        order, and all that begin a prompt before all that continue one.
    """
    first = [(row, 0, min(length, chunk)) for row, length in enumerate(lengths)]
    later = [
        (row, start, min(start + chunk, length))
        for row, length in enumerate(lengths)
        for start in range(chunk, length, chunk)
    ]
    kinds = ((True, first), (False, later))
    return [(prefill, step) for prefill, parts in kinds for step in _packed(parts, chunk)]


def _packed(parts, chunk: int) -> list[list[tuple[int, int, int]]]:
    """Parts in their order, as many together as have at most ``chunk`` tokens."""
    steps, room = [], 0
    for part in parts:
        size = part[2] - part[1]
        if size > room:
            steps.append([])
            room = chunk
        steps[-1].append(part)
        room -= size
    return steps


def read_in_chunks(run, config, input_ids, lengths, slot_mapping, block_tables, **kwargs):
    """A prefill in steps of at most ``config.prefill_chunk`` tokens.

    Args:
        run: one step of a model, by the keywords of paged_step; returns logits ``[B, V]``.
        config: TelechatConfig.
        input_ids, lengths, slot_mapping, block_tables: see paged_step.
        kwargs: what paged_step takes besides.

    Returns:
        Logits ``[B, V]`` of the prompts' last tokens.
    """
    input_ids, lengths, tables = np.asarray(input_ids), np.asarray(lengths), np.asarray(block_tables)
    slots = np.asarray(slot_mapping).reshape(-1)
    slots = np.split(slots[slots >= 0], np.cumsum(lengths)[:-1])
    longest = kwargs.pop("longest", None)
    if longest is None and config.extend_by_prompt:
        longest = lengths
    logits = [None] * len(lengths)
    for prefill, step in pieces(lengths, config.prefill_chunk):
        rows, starts, stops = (np.array(column) for column in zip(*step, strict=True))
        found = run(
            input_ids=input_ids[rows],
            valid_length_each_example=stops,
            slot_mapping=np.concatenate([slots[row][start:stop] for row, start, stop in step]),
            block_tables=tables[rows],
            prefill=prefill,
            starts=None if prefill else starts,
            longest=None if longest is None else np.asarray(longest)[rows],
            **kwargs,
        )
        for (row, _, stop), values in zip(step, found.asnumpy(), strict=True):
            if stop == lengths[row]:
                logits[row] = values
    return Tensor(np.stack(logits))
