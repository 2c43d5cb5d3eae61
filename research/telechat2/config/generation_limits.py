"""How long a prompt and its answer may be, and whether the KV cache has room: one rule for all who ask."""

from collections.abc import Sequence
from dataclasses import dataclass

from research.telechat2.common.errors import UsageError
from research.telechat2.config.model_settings import ModelSettings


@dataclass(frozen=True)
class GenerationLimits:
    """How many tokens a prompt and its answer may have, and how many blocks the KV cache has for them.

    Attributes:
        max_length: most tokens of prompt and answer together.
        source: the setting that ``max_length`` comes from, for messages.
        max_new_tokens: most tokens of an answer; None: as many as ``max_length`` leaves.
        block_size: tokens of a KV-cache block.
        num_blocks: KV-cache blocks; 0 without a cache.
    """

    max_length: int
    source: str = "--max_length"
    max_new_tokens: int | None = None
    block_size: int = 1
    num_blocks: int = 0

    @classmethod
    def of(
        cls, model: ModelSettings, max_length: int | None = None, max_new_tokens: int | None = None
    ) -> "GenerationLimits":
        """The limits of a model and a request.

        Args:
            model: the settings of the model.
            max_length: as asked for; None: the model's ``max_decode_length``, or with ``max_new_tokens`` its
                ``seq_length``.
            max_new_tokens: as asked for.

        Raises:
            UsageError: ``max_length`` is above the model's ``seq_length``.
        """
        source = "--max_length"
        if max_length is None:
            max_length, source = model.seq_length, "the YAML's seq_length"
            if max_new_tokens is None and model.max_decode_length < max_length:
                max_length, source = model.max_decode_length, "the YAML's max_decode_length"
        elif max_length > model.seq_length:
            raise UsageError(
                f"max_length is {max_length}, but the YAML's seq_length is {model.seq_length}; lower it, or "
                "raise seq_length in the YAML."
            )
        num_blocks = model.num_blocks if model.use_past else 0
        return cls(max_length, source, max_new_tokens, model.block_size, num_blocks)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds, of all prompts and answers together."""
        return self.num_blocks * self.block_size

    def end(self, prompt: int) -> int:
        """Most tokens of a prompt of ``prompt`` tokens and its answer together."""
        if self.max_new_tokens is None:
            return max(prompt, self.max_length)
        return min(prompt + self.max_new_tokens, self.max_length)

    def room(self, prompt: int) -> int:
        """Most tokens of the answer to a prompt of ``prompt`` tokens."""
        return self.end(prompt) - prompt

    def check_prompt(self, prompt: int) -> None:
        """UsageError if a prompt of ``prompt`` tokens leaves no room for an answer."""
        if prompt >= self.max_length:
            raise UsageError(
                f"the prompt has {prompt} tokens, but prompt and answer together may have {self.max_length} "
                f"({self.source}); shorten the prompt or raise that."
            )

    def check_cache(self, prompts: Sequence[int]) -> None:
        """UsageError if prompts of these lengths, with their answers, may run out of KV-cache blocks.

        The last token of a row is never cached.
        """
        needed = sum(-(-max(self.end(prompt) - 1, 1) // self.block_size) for prompt in prompts)
        if needed > self.num_blocks > 0:
            raise UsageError(
                f"a batch of {len(prompts)} prompts with their answers needs up to {needed} blocks of "
                f"{self.block_size} tokens, but the cache has {self.num_blocks}; raise "
                "model_config.num_blocks, or ask for fewer prompts or shorter answers at once."
            )
