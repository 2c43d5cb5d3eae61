"""The host's side of a generation step with a paged cache: NumPy in, the tensors of one graph call out.

B: requests, T: tokens of a step, M: columns of the block tables.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor


def dynamic_inputs(config) -> dict[str, Tensor]:
    """Placeholders of any shape, for a graph that serves prompts and batches of every size."""
    axes = dict.fromkeys(("input_ids", "batch_valid_length", "block_tables"), 2)
    axes |= dict.fromkeys(("position_ids", "slot_mapping", "last_token"), 1)
    if config.extend_method == "DYNAMIC_NTK":
        axes["rotary_lengths"] = 1
    return {name: Tensor(shape=[None] * count, dtype=ms.int32) for name, count in axes.items()}


def step_inputs(
    config,
    kernels,
    requests,
    input_ids,
    *,
    prefill,
    valid_length_each_example,
    block_tables,
    slot_mapping,
    starts=None,
    longest=None,
    **kwargs,
) -> dict:
    """Inputs of ``TelechatForCausalLM.construct`` for one step, from MindFormers' arguments.

    Args:
        config, kernels: of the model.
        requests: the model's RequestLengths with DYNAMIC_NTK, else None.
        input_ids: ``[B, seq_length]``, every row's tokens from its first to its newest, then padding.
        prefill: whether prompts are read from their beginning, or tokens whose sequence is in the cache.
        valid_length_each_example: ``[B]``, tokens of each row.
        block_tables: ``[B, seq_length / block_size]``, -1 where a row has no block yet.
        slot_mapping: slots of the tokens read, -1 for padding.
        starts: ``[B]``, position of the first token of each row that chunked prefill reads; else None.
        longest: ``[B]``, tokens that each row may reach, if the caller knows; see RequestLengths.
        kwargs: what MindFormers passes besides; not needed.

    Returns:
        int32 tensors by name; ``batch_valid_length`` is an array, which MindFormers wraps itself.
    """
    lengths, tables = np.asarray(valid_length_each_example, np.int32), np.asarray(block_tables)
    slots = np.asarray(slot_mapping, np.int32).reshape(-1)
    factors = None
    if requests is not None:
        begins = prefill if starts is None else np.asarray(starts) == 0
        factors = requests.of_rows(begins, lengths, tables, longest=longest)
    if kernels.reads_every_block:
        tables = tables[:, : _rounded(-(-int(lengths.max()) // config.block_size), config)]
    if prefill:
        step = prefill_inputs(config, np.asarray(input_ids), lengths, tables, slots, factors)
    elif starts is None:
        step = decode_inputs(np.asarray(input_ids), lengths, tables, slots, factors)
    else:
        step = chunk_inputs(np.asarray(input_ids), np.asarray(starts), lengths, tables, slots, factors)
    lengths = step.pop("batch_valid_length").astype(np.int32).reshape(1, -1)
    tensors = {name: Tensor.from_numpy(np.ascontiguousarray(value, np.int32)) for name, value in step.items()}
    return {**tensors, "batch_valid_length": lengths}


def prefill_inputs(config, input_ids, lengths, block_tables, slots, factors) -> dict[str, np.ndarray]:
    """Whole prompts, one after the other, with padding at the end where every shape has its own graph.

    Args:
        config: TelechatConfig.
        input_ids: ``[B, seq_length]``.
        lengths: ``[B]``, tokens of each prompt.
        block_tables: ``[B, M]``.
        slots: of all tokens; those of -1 are left out.
        factors: ``[B]``, the length whose rotary factor each prompt has, with DYNAMIC_NTK alone; else None.

    Returns:
        ``input_ids`` ``[1, T]``, ``position_ids``, ``slot_mapping`` (-1: padding) and ``rotary_lengths``
        ``[T]``, ``last_token`` and ``batch_valid_length`` ``[B]``, ``block_tables`` ``[B, M]``.
    """
    step = chunk_inputs(input_ids, np.zeros_like(lengths), lengths, block_tables, slots[slots >= 0], factors)
    size = len(step["position_ids"])
    padding = (0, _rounded(size, config) - size)
    for name in {"position_ids", "rotary_lengths"} & step.keys():
        step[name] = np.pad(step[name], padding)
    return step | {
        "input_ids": np.pad(step["input_ids"][:, 0], padding)[None],
        "slot_mapping": np.pad(step["slot_mapping"], padding, constant_values=-1),
        "block_tables": block_tables,
        "batch_valid_length": lengths,
    }


def decode_inputs(input_ids, lengths, block_tables, slots, factors) -> dict[str, np.ndarray]:
    """The newest token of each request: arguments as for prefill_inputs, but ``slots`` ``[B]``.

    Returns:
        ``input_ids`` ``[B, 1]``, ``position_ids``, ``slot_mapping``, ``rotary_lengths``, ``last_token`` and
        ``batch_valid_length`` ``[B]``, ``block_tables`` ``[B, M]``.
    """
    return chunk_inputs(input_ids, lengths - 1, lengths, block_tables, slots, factors)


def chunk_inputs(input_ids, starts, lengths, block_tables, slots, factors) -> dict[str, np.ndarray]:
    """Pieces of prompts whose beginnings are in the cache, by a decode step: see chunked_prefill.py.

    Args:
        input_ids, block_tables, factors: as for prefill_inputs.
        starts, lengths: ``[B]``; row i reads its tokens ``starts[i]`` to ``lengths[i] - 1``.
        slots: ``[T]``, of the tokens read.

    Returns:
        A row for each token: ``input_ids`` ``[T, 1]``, ``position_ids``, ``slot_mapping``, ``rotary_lengths``
        and ``batch_valid_length`` (the tokens up to this one) ``[T]``, ``block_tables`` ``[T, M]``; and
        ``last_token`` ``[B]``.
    """
    counts = lengths - starts
    rows = np.repeat(np.arange(len(lengths)), counts)
    last = np.cumsum(counts) - 1
    positions = np.arange(len(rows)) - (last - lengths + 1)[rows]
    step = {} if factors is None else {"rotary_lengths": factors[rows]}
    return step | {
        "input_ids": input_ids[rows, positions][:, None],
        "position_ids": positions,
        "slot_mapping": slots,
        "block_tables": block_tables[rows],
        "batch_valid_length": positions + 1,
        "last_token": last,
    }


def _rounded(size: int, config) -> int:
    """``size``, or where every shape has its own graph the next power of two from 16 on."""
    return size if config.is_dynamic else max(16, 1 << (size - 1).bit_length())
