"""What a prediction checks before it loads a model."""

from research.telechat2.common.errors import UsageError
from research.telechat2.text import prompt_format as prompt_formats


def check_length(tokens: int, max_length: int, limited_by: str) -> None:
    """UsageError if a prompt of ``tokens`` tokens leaves no room for an answer."""
    if tokens >= max_length:
        raise UsageError(
            f"the prompt has {tokens} tokens, but prompt and answer together may have {max_length} "
            f"({limited_by}); shorten the prompt or raise that."
        )


def length_of_config(max_decode_length: int, seq_length: int) -> tuple[int, str]:
    """Most tokens of prompt and answer together by a model's config, and the field that says so."""
    limits = ((seq_length, "the YAML's seq_length"), (max_decode_length, "the YAML's max_decode_length"))
    return min(limits, key=lambda limit: limit[0])


def choose_prompt_format(given: str | None, checkpoint, tokenizer) -> tuple[str, str]:
    """The prompt format to use, and why: by default that of the release which the vocabulary is of."""
    if given:
        return given, "as asked for"
    record = prompt_formats.record_of(checkpoint)
    if record is not None:
        return prompt_formats.find(checkpoint), f"recorded in {record}"
    reason = f"none is recorded with {checkpoint}: give --prompt_format plain if it was tuned in that"
    if tokenizer.release_format != "chat":
        reason = f"the vocabulary is that of TeleChat v1; {reason}"
    return tokenizer.release_format, reason


def check_vocabulary(tokenizer, vocab_file, settings: dict) -> None:
    """UsageError if a vocabulary and the ``model_config`` settings of a model do not go together."""
    if tokenizer.vocab_size > settings["vocab_size"]:
        raise UsageError(
            f"{vocab_file} has {tokenizer.vocab_size} tokens, but the YAML's vocab_size is "
            f"{settings['vocab_size']}; this is another model's vocabulary."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found, expected = getattr(tokenizer, name), settings[name]
        if found != expected and (name, expected) != ("pad_token_id", -1):
            raise UsageError(
                f"the model's {name} is {expected}, but in {vocab_file} it is {found}; correct it in the "
                "YAML's model_config or the config.json beside the weights, whichever states it, or use the "
                "vocabulary of this model."
            )
