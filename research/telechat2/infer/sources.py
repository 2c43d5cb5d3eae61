"""What a prediction is made of: YAML, weights, vocabulary and prompt format, checked against each other.

Prediction and the folder for MindIE read them here.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from research.telechat2.checkpoint.release.stated import said_of
from research.telechat2.common.errors import UsageError
from research.telechat2.config.overrides import apply_overrides
from research.telechat2.config.preflight import Facts, preflight
from research.telechat2.config.sections import section_of
from research.telechat2.config.yaml_files import read_config
from research.telechat2.data.same_vocabulary import check_answering_vocabulary
from research.telechat2.text import prompt_format as prompt_formats


@dataclass
class Sources:
    """The files of a prediction.

    ``config``: the YAML with its bases; its ``model_config`` holds what the checkpoint's config.json adds.
    ``shared``, ``taken``: see Checked.
    """

    yaml_file: Path
    config: dict
    checkpoint: Path
    vocab_file: Path
    shared: dict | None
    taken: Sequence[str]


def read_sources(
    yaml_file: str | Path,
    checkpoint: str | Path | None = None,
    vocab_file: str | Path | None = None,
    processes: int | None = None,
    changes: Mapping[str, object] | None = None,
) -> Sources:
    """Read and check what a prediction is made of; of the weights only what is stated beside them.

    Notes go to standard error.

    Args:
        yaml_file: a predict YAML, which gives the defaults of the next two.
        checkpoint: weights of any layout, torch or MindSpore.
        vocab_file: tokenizer.model or the folder with it; if the YAML names none either, that beside the
            weights.
        processes: that predict with the model now; None: it is served by others.
        changes: of the YAML, dotted key to value.
    """
    config = read_config(Path(yaml_file))
    if not section_of(config, "model.model_config"):
        raise UsageError(f"{yaml_file} has no section model.model_config; use a predict YAML.")
    apply_overrides(config, changes or {})
    weights = checkpoint or config.get("load_checkpoint")
    task, said = "predict" if processes else None, said_of(config, weights)
    facts = Facts(str(yaml_file), task=task, devices=processes, weights=bool(weights), said=said)
    checked = preflight(config, facts)
    for note in checked.notes:
        print(f"note: {note}", file=sys.stderr)
    checkpoint = _existing(checkpoint, config, "load_checkpoint", "--checkpoint_path", yaml_file)
    section = section_of(config, "processor.tokenizer")
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "tokenizer.model"
    if not (vocab_file or section.get("vocab_file")) and beside.is_file():
        print(f"vocabulary: {beside}", file=sys.stderr)
        vocab_file = beside
    vocab_file = _existing(vocab_file, section, "vocab_file", "--vocab_file_path", yaml_file)
    if vocab_file.is_dir():
        vocab_file /= "tokenizer.model"
    if not vocab_file.is_file():
        raise UsageError(f"{vocab_file} does not exist; give the tokenizer.model of a TeleChat2 release.")
    check_answering_vocabulary(vocab_file, checkpoint)
    return Sources(Path(yaml_file), config, checkpoint, vocab_file, checked.shared, checked.taken)


def exists(text: str) -> bool:
    """Whether a text names a file or folder."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or a zero byte in it
        return False


@contextmanager
def numbered(what: str, number: int, count: int) -> Iterator[None]:
    """Name the prompt or question that a UsageError of the block is about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{what} {number} of {count}: {error}") from error


def _existing(given, section: dict, key: str, flag: str, yaml_file) -> Path:
    """The path of a flag, else of the YAML's key; the message names the one that it comes from."""
    if not (path := given or section.get(key)):
        raise UsageError(f"{yaml_file} names no {key}; give {flag}.")
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"{flag if given else f'{yaml_file}: {key}'} {path} does not exist.")
    return path


def open_tokenizer(sources: Sources, model_config, prompt_format: str | None):
    """The tokenizer, and the prompt format; where settings and format come from goes to standard error."""
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    tokenizer = TelechatTokenizer(str(sources.vocab_file))
    check_vocabulary(tokenizer, sources.vocab_file, vars(model_config))
    prompt_format, reason = choose_prompt_format(prompt_format, sources.checkpoint, tokenizer)
    for line in (*sources.taken, f"prompt format: {prompt_format} ({reason})"):
        print(line, file=sys.stderr)
    return tokenizer, prompt_format


def check_weights(checkpoint: Path, model_config, ranks: int) -> None:
    """Refuse weights whose names or shapes are not those that ``ranks`` processes would load."""
    from research.telechat2.checkpoint.layouts.read import weights_of_rank
    from research.telechat2.checkpoint.sizes import sizes_of_model

    weights_of_rank(
        checkpoint, sizes_of_model(model_config), tensor_parallel=ranks, rank=0,
        qkv_concat=model_config.qkv_concat,
    )  # fmt: skip


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
    tokens, rows = tokenizer.vocab_size, settings["vocab_size"]
    if tokens > rows:
        raise UsageError(
            f"{vocab_file} has {tokens} tokens, but the YAML's vocab_size is {rows}; give this model's."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found, expected = getattr(tokenizer, name), settings[name]
        if found != expected and (name, expected) != ("pad_token_id", -1):
            raise UsageError(
                f"the model's {name} is {expected}, but in {vocab_file} it is {found}; correct it in the "
                "YAML's model_config or the config.json beside the weights, or use this model's vocabulary."
            )
