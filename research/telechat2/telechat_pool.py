"""The pool of blocks that holds the cached keys and values of a batch: what fits into it."""


def blocks_of(tokens: int, block_size: int) -> int:
    """Blocks that a row takes when prompt and answer have ``tokens`` tokens: the last one is never cached."""
    return -(-max(int(tokens) - 1, 1) // block_size)


def check_pool(config, longest) -> None:
    """Refuse a batch that may run out of blocks, before its first step.

    Args:
        config: with ``block_size`` and ``num_blocks``.
        longest: ``[B]``, tokens that prompt and answer of each row may have.

    Raises:
        ValueError: with the numbers of blocks.
    """
    needed = sum(blocks_of(tokens, config.block_size) for tokens in longest)
    if needed > config.num_blocks:
        raise ValueError(
            f"a batch of {len(longest)} prompts, whose answers may bring them to {max(longest)} tokens each, "
            f"needs up to {needed} blocks of {config.block_size} tokens, but the cache has "
            f"{config.num_blocks}; raise model_config.num_blocks, or ask for fewer prompts or shorter "
            "answers at once."
        )
