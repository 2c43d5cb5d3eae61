"""Whether data, weights and tokenizer are of one vocabulary: by hash, or by pieces where files are there.

Ids of another vocabulary train and answer without an error as long as they are below ``vocab_size``.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from research.telechat2.checkpoint.sizes import CONFIG, config_beside
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import read_json
from research.telechat2.text.prompt_format import manifest_path
from research.telechat2.text.sentencepiece_vocabulary import SentencePieceVocabulary

MODEL = "tokenizer.model"
HASH_KEY = "tokenizer_sha256"  # in the config.json of what was trained here


def check_data_vocabulary(files: Iterable[Path], weights: str | Path | None) -> None:
    """Compare the vocabulary that MindRecord files were made with, and that of the weights.

    Files without a manifest, and weights without a tokenizer or a record of it, are not compared.
    UsageError for two vocabularies.
    """
    made = [(file, tokenizer) for file in files if (tokenizer := _tokenizer_of(file)).get("sha256")]
    for file, tokenizer in made[1:]:
        first_file, first = made[0]
        if not _same(tokenizer, first["sha256"], _existing(first)):
            both = f"{first.get('path')} and {tokenizer.get('path')}"
            remedy = "prepare all data with one tokenizer.model"
            raise UsageError(f"{first_file} and {file} have two vocabularies ({both}): {remedy}.")
    if not made or weights is None:
        return
    file, tokenizer = made[0]
    digest, beside, where = vocabulary_of_weights(Path(weights).expanduser())
    if digest and not _same(tokenizer, digest, beside):
        found = f"{file} was made with {tokenizer.get('path')} ({_short(tokenizer['sha256'])})"
        expected = f"the weights {weights} belong to another vocabulary ({_short(digest)}, {where})"
        remedy = "prepare the data again with their tokenizer.model, or load the weights of the data"
        raise UsageError(f"{found}, but {expected}: {remedy}.")


def check_answering_vocabulary(vocab_file: str | Path, weights: str | Path | None) -> None:
    """Compare a prediction's vocabulary with that of the weights, if known. UsageError when they differ."""
    if weights is None or Path(vocab_file).suffix != ".model":
        return
    digest, beside, where = vocabulary_of_weights(Path(weights).expanduser())
    own = {"sha256": sha256(vocab_file), "path": str(vocab_file)}
    if digest and not _same(own, digest, beside):
        found = f"{vocab_file} ({_short(own['sha256'])}) is not the vocabulary of the weights {weights}"
        raise UsageError(f"{found} ({_short(digest)}, {where}); give their tokenizer.model.")


def check_pieces(vocab_file: str | Path | None, settings: Mapping[str, Any]) -> None:
    """Compare a SentencePiece vocabulary of another kind, such as a Llama's, with ``model_config``.

    UsageError for more pieces than the embedding has rows, or ordinary pieces as bos_token_id, eos_token_id.
    """
    vocabulary = _load(Path(vocab_file)) if vocab_file and Path(vocab_file).is_file() else None
    if vocabulary is None:
        return
    size, rows, model = vocabulary.size, settings["vocab_size"], vocabulary.model
    if size > rows:
        remedy = "give this model's vocabulary"
        raise UsageError(f"{vocab_file} has {size} pieces, but the model's vocab_size is {rows}; {remedy}.")
    for name, own in (("bos_token_id", model.bos_id()), ("eos_token_id", model.eos_id())):
        given = settings[name] if isinstance(settings[name], list) else [settings[name]]
        for index in given:
            if not isinstance(index, int) or index == own or not 0 <= index < size:
                continue  # none, or a token that is added to the vocabulary
            piece = vocabulary.pieces[index]
            marked = index in vocabulary.control_ids or re.fullmatch(r"[<\[].*[>\]]", piece)
            if not marked or index in vocabulary.byte_ids:
                found = f"{name} is {index}, in {vocab_file} the text {piece!r}; its own is {own}"
                remedy = f"correct {name} in the YAML and config.json, or give this model's vocabulary"
                raise UsageError(f"{found}; {remedy}.")


def data_vocabulary(files: Iterable[Path]) -> str | None:
    """The hash of the vocabulary that MindRecord files were made with; None where no manifest has it."""
    hashes = (_tokenizer_of(file).get("sha256") for file in files)
    return next(filter(None, hashes), None)


def vocabulary_of_weights(path: Path) -> tuple[str | None, Path | None, str]:
    """Hash, file and place of the vocabulary that weights belong to; None where it is not known."""
    config = config_beside(path)
    recorded = (read_json(config) or {}).get(HASH_KEY) if config else None
    folder = config.parent if config and config.name == CONFIG else path if path.is_dir() else path.parent
    beside = folder / MODEL
    if isinstance(recorded, str):
        same = beside.is_file() and sha256(beside) == recorded
        return recorded, beside if same else None, f"recorded in {config}"
    if beside.is_file():
        return sha256(beside), beside, str(beside)
    return None, None, ""


def sha256(path: str | Path) -> str:
    """The hash of a file, as manifests have it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_of(file: Path) -> dict[str, Any]:
    path = manifest_path(file)
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8")).get("tokenizer") if path.is_file() else None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):  # check_dataset reports it
        return {}
    return tokenizer if isinstance(tokenizer, dict) else {}


def _same(tokenizer: dict[str, Any], digest: str, other: Path | None) -> bool:
    """Whether a tokenizer is that of ``digest``, or one of the same pieces where both files are there."""
    if tokenizer["sha256"] == digest:
        return True
    own = _existing(tokenizer)
    return own is not None and other is not None and _pieces(own) == _pieces(other)


def _existing(tokenizer: dict[str, Any]) -> Path | None:
    path = Path(tokenizer.get("path") or "")
    return path if path.is_file() and sha256(path) == tokenizer["sha256"] else None


def _load(path: Path) -> SentencePieceVocabulary | None:
    """A SentencePiece vocabulary; None if the file is another's."""
    try:
        return SentencePieceVocabulary(path.read_bytes())
    except (UsageError, OSError):
        return None


def _pieces(path: Path) -> list[object]:
    vocabulary = _load(path)
    if vocabulary is None:
        return [sha256(path)]
    scores = vocabulary.model.get_score(list(range(vocabulary.size)))
    return [vocabulary.pieces, vocabulary.control_ids, scores]


def _short(digest: str) -> str:
    return f"sha256 {digest[:12]}…"
