"""Read the vocabulary of a model, of whichever kind its file is."""

from collections.abc import Iterable
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.placeholders import what_stands_here
from research.telechat2.text.byte_level_vocabulary import ByteLevelVocabulary
from research.telechat2.text.sentencepiece_vocabulary import SentencePieceVocabulary
from research.telechat2.text.vocabulary import MARKERS, Vocabulary


def load_vocabulary(vocab_file: str | Path | None, markers: Iterable[str] = MARKERS) -> Vocabulary:
    """Read a tokenizer.model, or the tokenizer.json of TeleChat v1 7B.

    Raises:
        UsageError: there is no such file, it is no vocabulary, or one without ``markers``.
    """
    if not vocab_file:
        raise UsageError("vocab_file is not set; give the path of the model's tokenizer.model")
    path = Path(vocab_file)
    if path.is_dir():
        raise UsageError(f"vocab_file {path} is a directory; give the path of the tokenizer.model in it")
    if not path.is_file():
        raise UsageError(f"vocab_file {path} does not exist; give the path of the model's tokenizer.model")
    kind: type[Vocabulary]
    kind = ByteLevelVocabulary if path.name.endswith("tokenizer.json") else SentencePieceVocabulary
    try:
        vocabulary = kind(path.read_bytes())
        vocabulary.require(markers)
    except UsageError as error:
        raise UsageError(
            f"vocab_file {path}: {error}; give the {kind.file_name} that was released with the weights, and "
            f"check that it is complete.{what_stands_here(path)}"
        ) from error
    return vocabulary
