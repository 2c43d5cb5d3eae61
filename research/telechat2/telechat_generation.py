"""The host's side of a generation step with a paged cache: NumPy in, the tensors of one graph call out."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from research.telechat2 import telechat_ops


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
    requests=None,
    longest=None,
    **kwargs,
):
    """Inputs of ``TelechatForCausalLM.construct`` for one prefill or decode step.

    Args:
        config: TelechatConfig.
        input_ids: ``[B, seq_length]``, every row's tokens from its first to its newest, then padding.
        prefill: whether the prompts are read, or one token of each row is.
        valid_length_each_example: ``[B]``, tokens of each row.
        block_tables: ``[B, seq_length / block_size]``, -1 where a row has no block yet.
        slot_mapping: slots of the tokens read, -1 for padding.
        requests: RequestLengths of the model's engine, with DYNAMIC_NTK alone.
        longest: ``[B]``, tokens that each row may reach, if the caller knows; see RequestLengths.
        kwargs: what MindFormers passes besides; not needed.

    Returns:
        dict of int32 tensors; ``block_tables`` and ``batch_valid_length`` included.
    """
    lengths = np.asarray(valid_length_each_example, np.int32)
    slots = np.asarray(slot_mapping, np.int32).reshape(-1)
    if requests is not None:
        rotary_lengths = requests.of_rows(prefill, lengths, block_tables, longest=longest)
    if prefill:
        tokens = np.concatenate([row[:n] for row, n in zip(input_ids, lengths, strict=True)])
        positions = np.concatenate([np.arange(n) for n in lengths])
        slots = slots[slots >= 0]
        padding = _rounded(len(tokens), config) - len(tokens)
        tokens, positions = np.pad(tokens, (0, padding)), np.pad(positions, (0, padding))
        slots = np.pad(slots, (0, padding), constant_values=-1)
        tokens, last = tokens.reshape(1, -1), np.cumsum(lengths) - 1
    else:
        tokens = np.take_along_axis(np.asarray(input_ids), lengths[:, None] - 1, axis=1)
        positions, last = lengths - 1, np.arange(len(lengths))
    step = {
        "input_ids": tokens,
        "position_ids": positions,
        "block_tables": _needed_blocks(np.asarray(block_tables), lengths, config),
        "slot_mapping": slots,
        "last_token": last,
    }
    if requests is not None:
        rotary_lengths = np.repeat(rotary_lengths, lengths if prefill else 1)
        step["rotary_lengths"] = np.pad(rotary_lengths, (0, len(positions) - len(rotary_lengths)))
    tensors = {name: Tensor.from_numpy(np.ascontiguousarray(value, np.int32)) for name, value in step.items()}
    # The library wraps this one itself, just before the call.
    return {**tensors, "batch_valid_length": lengths.reshape(1, -1)}


def _rounded(size: int, config) -> int:
    """``size``, or where every shape has its own graph the next power of two from 16 on."""
    return size if config.is_dynamic else max(16, 1 << (size - 1).bit_length())


def _needed_blocks(block_tables, lengths, config):
    """The columns that hold blocks, or all where it costs nothing to leave the others in."""
    if not telechat_ops.reads_every_block():
        return block_tables
    needed = -(-int(lengths.max()) // config.block_size)
    return block_tables[:, : _rounded(needed, config)]
