"""What goes along with the weights of a TeleChat model itself, of version 2 or 1."""

from pathlib import Path

from research.telechat2.checkpoint.relatives.description import describe_telechat, lost_ids
from research.telechat2.checkpoint.relatives.reading import read_json
from research.telechat2.checkpoint.relatives.tokenizer_files import GENERATION, companions, vocabulary_notes
from research.telechat2.checkpoint.relatives.yamls import yaml_files
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.table import Side


def telechat_files(
    config: Path, sizes: TelechatSizes, side: Side
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Small files for the folder of converted weights, beside config.json, and notes on them.

    ``config`` is where the source's config.json would be, ``side`` which names the source has. Those files go
    along that the other side needs later; MindSpore weights of TeleChat v1 get YAMLs, since none is shipped.

    Raises:
        ValueError: the config asks for what no TeleChat model here has.
    """
    files = companions(config.parent)
    notes = (f"{', '.join(files)} go along too",) if files else ()
    notes += vocabulary_notes(files, sizes.vocab_size)
    content = read_json(config)
    if content is None:
        return files, notes
    try:
        description = describe_telechat(content, read_json(config.parent / GENERATION), sizes)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None
    notes += (f"rotary base {description.theta:.8g}, up to {description.seq_length:,} tokens",)
    if description.origin == "telechat v1" and side == "torch":
        yamls = yaml_files(description)
        notes += (f"{' and '.join(yamls)} run this model, TeleChat v1", *lost_ids(description))
        return files | yamls, notes
    return files, notes
