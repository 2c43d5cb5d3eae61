"""The host's side of a generation step with a paged cache: NumPy in, the tensors of one graph call out."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from research.telechat2.model.kernels import select


def dynamic_inputs(config) -> dict[str, Tensor]:
    """Shapes of a graph that serves prompts and batches of every size; None stands for an unknown one."""
    shapes = {
        "input_ids": [None, None],
        "position_ids": [None],
        "batch_valid_length": [None, None],
        "block_tables": [None, None],
        "slot_mapping": [None],
        "last_token": [None],
    }
    if config.extend_method == "DYNAMIC_NTK":
        shapes["rotary_lengths"] = [None]
    return {name: Tensor(shape=shape, dtype=ms.int32) for name, shape in shapes.items()}


def paged_step(
    config,
    input_ids,
    *,
    prefill,
    valid_length_each_example,
    block_tables,
    slot_mapping,
    starts=None,
    requests=None,
    longest=None,
    **kwargs,
):
    """Inputs of ``TelechatForCausalLM.construct`` for one prefill or decode step.

    In a decode step the graph has a row for each token, with the blocks of its sequence and the tokens up to
    it: one for each sequence, or more where pieces of prompts are read (generation/chunked_prefill.py).

    Args:
        config: TelechatConfig.
        input_ids: ``[B, seq_length]``, every row's tokens from its first to its newest, then padding.
        prefill: whether prompts are read from their beginning, or tokens whose sequence is in the cache.
        valid_length_each_example: ``[B]``, tokens of each row.
        block_tables: ``[B, seq_length / block_size]``, -1 where a row has no block yet.
        slot_mapping: slots of the tokens read, -1 for padding.
        starts: ``[B]``, position of the first token of each row that a decode step reads; None: the last.
        requests: RequestLengths of the model's engine, with DYNAMIC_NTK alone.
        longest: ``[B]``, tokens that each row may reach, if the caller knows; see RequestLengths.
        kwargs: what MindFormers passes besides; not needed.

    Returns:
        dict of int32 tensors; ``block_tables`` and ``batch_valid_length`` included.
    """
    lengths, tables = np.asarray(valid_length_each_example, np.int32), np.asarray(block_tables)
    slots = np.asarray(slot_mapping, np.int32).reshape(-1)
    if starts is None:
        begins, starts = prefill, np.zeros_like(lengths) if prefill else lengths - 1
    else:
        starts = np.asarray(starts)
        begins = starts == 0  # a decode step may begin a prompt, beside other rows
    counts = lengths - starts
    rows = np.repeat(np.arange(len(lengths)), counts)
    last = np.cumsum(counts) - 1
    positions = np.arange(len(rows)) - (last - lengths + 1)[rows]
    tokens, padding = np.asarray(input_ids)[rows, positions], 0
    step = {}
    if requests is not None:
        step["rotary_lengths"] = requests.of_rows(begins, lengths, tables, longest=longest)[rows]
    if prefill:
        slots = slots[slots >= 0]
        padding = _rounded(len(tokens), config) - len(tokens)
    else:
        tables, lengths = tables[rows], positions + 1
    step |= {"input_ids": tokens, "position_ids": positions}
    step = {name: np.pad(value, (0, padding)) for name, value in step.items()}
    step["input_ids"] = step["input_ids"].reshape((1, -1) if prefill else (-1, 1))
    step["slot_mapping"] = np.pad(slots, (0, padding), constant_values=-1)
    step["block_tables"] = _needed_blocks(tables, lengths, config)
    step["last_token"] = last
    tensors = {name: Tensor.from_numpy(np.ascontiguousarray(value, np.int32)) for name, value in step.items()}
    # The library wraps this one itself, just before the call.
    return {**tensors, "batch_valid_length": lengths.astype(np.int32).reshape(1, -1)}


def _rounded(size: int, config) -> int:
    """``size``, or where every shape has its own graph the next power of two from 16 on."""
    return size if config.is_dynamic else max(16, 1 << (size - 1).bit_length())


def _needed_blocks(block_tables, lengths, config):
    """The columns that hold blocks, or all where it costs nothing to leave the others in."""
    if not select.reads_every_block():
        return block_tables
    needed = -(-int(lengths.max()) // config.block_size)
    return block_tables[:, : _rounded(needed, config)]
