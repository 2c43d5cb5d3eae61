"""The options and inputs of a run of the preprocessor."""

from pathlib import Path
from typing import NamedTuple

from research.telechat2.common.errors import UsageError
from research.telechat2.data.sources import Source
from research.telechat2.text.chat import TRAIN_ON
from research.telechat2.text.load_vocabulary import load_vocabulary
from research.telechat2.text.vocabulary import Vocabulary

LONGEST_RECORD = 12_000_000  # tokens; MindSpore 2.9 writes them, and fails at 16 million (128 MB)
# What the options may be: the least value of a number, or one of several words.
LEAST = {"max_length": 2, "seed": 0, "records_per_file": 1}
CHOICES = {
    "train_on": TRAIN_ON,
    "too_long": ("skip", "truncate", "error"),
    "bad_lines": ("error", "skip"),
}


class Options(NamedTuple):
    """What decides the result, beside the data and the vocabulary; it is recorded in the manifest."""

    max_length: int = 8192
    seed: int = 2024
    train_on: str = "answers"
    too_long: str = "skip"
    bad_lines: str = "error"
    records_per_file: int | None = None  # None: one file, but numbered ones above FILE_BYTES
    ignore_fields: str = ""  # names of fields that count as absent, with commas between them

    @property
    def capacity(self) -> int:
        """Tokens of a record, which the model reads but the last and predicts but the first."""
        return self.max_length + 1

    def check(self) -> None:
        """UsageError for a value that is not allowed."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; expected at least {least}")
        if self.max_length > LONGEST_RECORD:
            most = f"a record holds at most {LONGEST_RECORD:,} tokens"
            raise UsageError(f"max_length is {self.max_length:,}, but {most}; give the model's seq_length")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(allowed)}")


def ignored_fields(names: str | None) -> frozenset[str]:
    """The fields that ``--ignore_fields a,b`` names."""
    return frozenset(name.strip() for name in (names or "").split(",") if name.strip())


def vocabulary_of_data(vocab_file: str | Path) -> Vocabulary:
    """The vocabulary that data are prepared with. UsageError unless it is TeleChat2's SentencePiece model."""
    if Path(vocab_file).suffix == ".json":
        raise UsageError(f"{vocab_file} is no SentencePiece model; give the tokenizer.model of the release")
    return load_vocabulary(vocab_file)


class Job(NamedTuple):
    """One run."""

    options: Options
    found: list[Source]
    vocab_file: Path
    vocabulary: Vocabulary
    target: Path
    folder: Path


class Part(NamedTuple):
    """A finished MindRecord file."""

    name: str
    records: int
    tokens: int  # without padding; those repeated at the splits of texts count twice
    documents: int  # in a record, at most
