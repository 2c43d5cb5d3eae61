"""Read the vocabulary of a model, of whichever kind its file is."""

from collections.abc import Iterable
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.placeholders import what_stands_here
from research.telechat2.text.byte_level_vocabulary import ByteLevelVocabulary
from research.telechat2.text.sentencepiece_vocabulary import SentencePieceVocabulary
from research.telechat2.text.vocabulary import MARKERS, Vocabulary


def load_vocabulary(vocab_file: str | Path | None, markers: Iterable[str] = MARKERS) -> Vocabulary:
    """Read a tokenizer.model, or the tokenizer.json of TeleChat v1 7B; UsageError if it lacks ``markers``."""
    if not vocab_file:
        raise UsageError("vocab_file is not set; give the path of the model's tokenizer.model")
    path = Path(vocab_file)
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise UsageError(f"vocab_file {path} {found}; give the path of the model's tokenizer.model")
    is_json = path.name.endswith("tokenizer.json")
    kind: type[Vocabulary] = ByteLevelVocabulary if is_json else SentencePieceVocabulary
    try:
        vocabulary = kind(path.read_bytes())
        vocabulary.require(markers)
    except UsageError as error:
        raise UsageError(
            f"vocab_file {path}: {error}; give the complete {kind.file_name} of the weights' release."
            + what_stands_here(path)
        ) from error
    return vocabulary
