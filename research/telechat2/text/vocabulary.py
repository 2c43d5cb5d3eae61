"""The tokenizer of the data pipeline: SentencePiece alone, so that a worker starts at once.

Gives the ids of ``TelechatTokenizer`` (a test compares them) without MindFormers, many texts at a time.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from research.telechat2.common.errors import UsageError
from research.telechat2.common.placeholders import what_stands_here
from research.telechat2.text import chat
from research.telechat2.text.literal import MARKERS, LiteralText, marker_id

PAD = "<_pad>"
# Text of kinds that vocabularies which normalise it (NFKC, single blanks) or know few characters change.
_PROBE = "Ａ，ﬁ①  \u3000½e\u0301 \t龘\U0001f4a9 "


class Span(NamedTuple):
    """A piece of a conversation as it is shown."""

    text: str
    trained: bool
    special: bool


class Vocabulary:
    """``proto``: the bytes of a ``tokenizer.model``. UsageError when they are no TeleChat2 vocabulary."""

    def __init__(self, proto: bytes):
        self.proto = proto
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        if self.size == 0:
            raise RuntimeError("it holds no pieces")
        self._special: dict[str, int | None] = {}
        self._literal = LiteralText(self.model)
        self._is_exact = self.model.decode(self.model.encode(_PROBE)) == _PROBE
        for marker in MARKERS:
            if self.special_id(marker) is None:
                controls = [self.model.id_to_piece(i) for i in range(self.size) if self.model.is_control(i)]
                raise UsageError(
                    f"the vocabulary has no control symbol {marker!r}; it has {', '.join(controls)}: "
                    f"this is not a TeleChat2 vocabulary"
                )

    @property
    def size(self) -> int:
        """Number of pieces; every id is below it."""
        return self.model.get_piece_size()

    @cached_property
    def pad_id(self) -> int:
        """The id that fills a record up."""
        return self.special_id(PAD)

    @cached_property
    def start_ids(self) -> list[int]:
        """The ids that begin a document: ``model_config.document_start_ids``."""
        return sorted(self.special_id(marker) for marker in (chat.START, chat.SYSTEM))

    def special_id(self, token: str) -> int | None:
        """Return the id of a special token (see ``literal``), None when the vocabulary has no such one."""
        if token not in self._special:
            self._special[token] = marker_id(self.model, token)
        return self._special[token]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of one text; see ``encode``. UsageError when it is not valid Unicode."""
        try:
            return self._literal.encode(text.encode())
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode: half of a surrogate pair "
                f"(U+{ord(error.object[error.start]):04X}) at character {error.start}; repair the text"
            ) from error

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        """Return the ids, int32, of texts in UTF-8, each encoded literally: ``<_end>`` in it is text."""
        found = self.model.encode_as_numpy(texts, num_threads=1)
        for i, text in enumerate(texts):
            if self._literal.needs_care(text):
                found[i] = np.array(self._literal.encode(text), np.int32)
        return found

    def changed(self, texts: list[bytes], ids: list[np.ndarray]) -> list[int]:
        """Which of the texts ``ids`` do not give back; none where the vocabulary changes no text."""
        if self._is_exact:
            return []
        pairs = enumerate(zip(texts, ids, strict=True))
        return [i for i, (text, found) in pairs if self.model.decode(found.tolist()).encode() != text]

    def _is_special(self, index: int) -> bool:
        return self.model.is_control(index) or index in self._literal.ordinary

    def spans(self, ids: Sequence[int], mask: Sequence[int]) -> list[Span]:
        """Return ids as text: each special token, and each run of others that are trained or not alike."""
        marked = [(index, bool(trained)) for index, trained in zip(ids, mask, strict=True)]
        found = []
        for (special, trained), run in groupby(marked, key=lambda m: (self._is_special(m[0]), m[1])):
            run_ids = [index for index, _ in run]
            texts = map(self.model.id_to_piece, run_ids) if special else [self.model.decode(run_ids)]
            found += [Span(text, trained, special) for text in texts]
        return found


def load(vocab_file: str | Path) -> Vocabulary:
    """Read a ``tokenizer.model``. UsageError when it is missing or no TeleChat2 vocabulary."""
    path = Path(vocab_file)
    if path.is_dir():
        raise UsageError(f"vocab_file {path} is a directory; give the path of the tokenizer.model in it")
    if not path.is_file():
        raise UsageError(f"vocab_file {path} does not exist; give the path of the model's tokenizer.model")
    if path.suffix == ".json":
        raise UsageError(
            f"vocab_file {path} is no SentencePiece model, and data are prepared with one alone; give the "
            f"tokenizer.model of the release"
        )
    proto = path.read_bytes()
    try:
        return Vocabulary(proto)
    except RuntimeError as error:
        raise UsageError(
            f"vocab_file {path} ({len(proto):,} bytes) is not a SentencePiece model ({error}); "
            "give the tokenizer.model that was released with the weights, and check that it is complete."
            + what_stands_here(path)
        ) from error
    except ValueError as error:
        raise UsageError(f"vocab_file {path}: {error}") from error
