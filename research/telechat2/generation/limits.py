"""The pool of blocks that holds the cached keys and values of a batch: what fits into it."""

import numpy as np

from research.telechat2.common.errors import UsageError


def blocks_needed(tokens: int, block_size: int) -> int:
    """Blocks that a row takes when prompt and answer have ``tokens`` tokens: the last one is never cached."""
    return -(-max(int(tokens) - 1, 1) // block_size)


def check_pool(config, longest) -> None:
    """Refuse a batch that may run out of blocks, before its first step.

    Args:
        config: with ``block_size`` and ``num_blocks``.
        longest: ``[B]``, tokens at which ``generate`` ends each row, see limits_of_rows.

    Raises:
        UsageError: with the numbers of blocks.
    """
    needed = sum(blocks_needed(tokens, config.block_size) for tokens in longest)
    if needed > config.num_blocks:
        raise UsageError(
            f"a batch of {len(longest)} prompts with their answers needs up to {needed} blocks of "
            f"{config.block_size} tokens, but the cache has {config.num_blocks}; raise "
            "model_config.num_blocks, or ask for fewer prompts or shorter answers at once."
        )


def limits_of_rows(config, prompt_lengths, max_new_tokens: int | None, max_length: int) -> np.ndarray:
    """Tokens ``[B]`` at which MindFormers' ``generate`` ends each row, see longest_of_rows."""
    prompt_lengths = np.asarray(prompt_lengths)
    if max_new_tokens is None:
        longest = np.maximum(prompt_lengths, max_length)
    else:
        longest = prompt_lengths + max_new_tokens
    return np.minimum(longest, config.seq_length)


def longest_of_rows(config, prompt_lengths, max_new_tokens: int | None, max_length: int) -> np.ndarray:
    """Tokens ``[B]`` that prompt and answer of each row may have, at most ``seq_length``.

    ``max_length`` counts both, and where ``max_new_tokens`` is given does not matter. With
    ``extend_by_prompt`` the prompts alone.
    """
    if config.extend_by_prompt:
        return np.minimum(prompt_lengths, config.seq_length)
    return limits_of_rows(config, prompt_lengths, max_new_tokens, max_length)
