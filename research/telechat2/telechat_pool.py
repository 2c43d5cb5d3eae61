"""The pool of blocks that holds the cached keys and values of a batch: what fits into it."""


def blocks_needed(tokens: int, block_size: int) -> int:
    """Blocks that a row takes when prompt and answer have ``tokens`` tokens: the last one is never cached."""
    return -(-max(int(tokens) - 1, 1) // block_size)


def check_pool(config, longest) -> None:
    """Refuse a batch that may run out of blocks, before its first step.

    Args:
        config: with ``block_size`` and ``num_blocks``.
        longest: ``[B]``, tokens at which ``generate`` ends each row, see limits_of_rows.

    Raises:
        ValueError: with the numbers of blocks.
    """
    needed = sum(blocks_needed(tokens, config.block_size) for tokens in longest)
    if needed > config.num_blocks:
        raise ValueError(
            f"a batch of {len(longest)} prompts with their answers needs up to {needed} blocks of "
            f"{config.block_size} tokens, but the cache has {config.num_blocks}; raise "
            "model_config.num_blocks, or ask for fewer prompts or shorter answers at once."
        )
