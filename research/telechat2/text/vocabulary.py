"""A vocabulary: the ids of text and of markers, and the text and bytes of ids.

Nothing is ever added to what the file holds, so every id is a row of the embedding. Text is encoded
literally: no marker is read in it, and no id of a marker comes out.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from research.telechat2.common.errors import UsageError

IdArray = npt.NDArray[np.int32]
TokenArray = npt.NDArray[np.uint32]  # ids with flags: see data/encoding.py
START, END, USER, BOT, SYSTEM, PAD = "<_start>", "<_end>", "<_user>", "<_bot>", "<_system>", "<_pad>"
MARKERS = (START, END, USER, BOT, SYSTEM, PAD)
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Text that a vocabulary changes which normalises it (NFKC, single blanks) or has few characters.
_PROBE = "Ａ，ﬁ①  \u3000½e\u0301 \t龘\U0001f4a9 "
EACH_BYTE = "telechat_each_byte"  # for str.decode: one replacement character for each invalid byte


def _replace_one_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error(EACH_BYTE, _replace_one_byte)


class Span(NamedTuple):
    """A piece of a conversation as it is shown."""

    text: str
    trained: bool
    special: bool


class Vocabulary(ABC):
    """The interface of every kind of vocabulary; a kind defines the methods that are abstract here.

    Attributes:
        file_name: what the file is called in a release.
        optional: markers that this kind may lack.
        content: the bytes of the file.
        size: number of ids; every id is below it.
        pieces: the piece of each id.
        unknown_id: the id of text that the vocabulary has no pieces for.
        control_ids: ids that stand for no text: markers, other control symbols, the unknown id.
        byte_ids: the bytes of ids that may be a part of a character.
        release_format: the prompt format of the release that has this vocabulary: v1, or chat.
    """

    file_name: ClassVar[str]
    optional: ClassVar[frozenset[str]] = frozenset()
    content: bytes
    size: int
    pieces: list[str]
    unknown_id: int
    control_ids: frozenset[int]
    byte_ids: dict[int, bytes]
    release_format: str

    def __init__(self, content: bytes):
        self.content = content

    @abstractmethod
    def encode_utf8(self, text: bytes) -> list[int]:
        """The ids of text in UTF-8. UsageError where the vocabulary cannot write it."""

    @abstractmethod
    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids among which is no control symbol; invalid bytes become replacement characters."""

    # ---------------------------------------------------------------------- special tokens
    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each piece."""
        return {piece: index for index, piece in enumerate(self.pieces)}

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token that the vocabulary has."""
        return {self.pieces[index]: index for index in sorted(self.control_ids)}

    @cached_property
    def tool_tag_ids(self) -> frozenset[int]:
        """Ids of tool tags, which are special tokens and part of an answer."""
        return frozenset(self.special_ids[tag] for tag in TOOL_TAGS if tag in self.special_ids)

    @cached_property
    def pad_id(self) -> int:
        """The id that fills a record up."""
        return self.special_ids[PAD]

    @cached_property
    def start_ids(self) -> list[int]:
        """The ids that begin a document: ``model_config.document_start_ids``."""
        return sorted(self.special_ids[marker] for marker in (START, SYSTEM))

    def require(self, markers: Iterable[str]) -> None:
        """UsageError for a marker that the vocabulary lacks, other than ``optional`` ones."""
        for marker in markers:
            if marker not in self.special_ids and marker not in self.optional:
                known = ", ".join(self.special_ids)
                raise UsageError(f"it has no control symbol {marker!r}, only {known}; correct its name")

    # ---------------------------------------------------------------------- text -> ids
    def encode_text(self, text: str) -> list[int]:
        """The ids of text; ``<_end>`` in it is text. UsageError when it is not valid Unicode."""
        try:
            return self.encode_utf8(text.encode())
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            found = f"half of a surrogate pair (U+{code:04X})"
            if 0xDC80 <= code <= 0xDCFF:  # what Python makes of such a byte of a command line or a terminal
                found = f"the byte 0x{code - 0xDC00:02X}, which is no UTF-8,"
            raise UsageError(f"the text holds {found} at character {error.start}; correct it") from error

    def encode_many(self, texts: list[bytes]) -> list[IdArray]:
        """The ids, int32, of each text in UTF-8."""
        return [np.array(self.encode_utf8(text), np.int32) for text in texts]

    # ---------------------------------------------------------------------- ids -> text
    def check_ids(self, ids: Sequence[int]) -> None:
        """UsageError for an id that is no row of the embedding (such as the ignored label -100)."""
        if ids and not (min(ids) >= 0 and max(ids) < self.size):
            wrong = next(i for i in ids if not 0 <= i < self.size)
            hint = "; -100 is an ignored label: leave those out" if wrong == -100 else ""
            raise UsageError(f"token id {wrong} is not in the vocabulary: 0 to {self.size - 1}{hint}")

    def control_text(self, index: int, skip_special_tokens: bool) -> str:
        """The text of a control symbol, "" where it is skipped; tool tags are content and never are."""
        is_skipped = skip_special_tokens and index not in self.tool_tag_ids
        return "" if is_skipped else self.pieces[index]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids. UsageError for an id that the vocabulary does not have."""
        self.check_ids(ids)
        text = ""
        for is_control, run in groupby(ids, self.control_ids.__contains__):
            if is_control:
                text += "".join(self.control_text(index, skip_special_tokens) for index in run)
            else:
                text += self.decode_text(list(run))
        return text

    @cached_property
    def _is_exact(self) -> bool:
        return self.decode_text(self.encode_utf8(_PROBE.encode())) == _PROBE

    def changed(self, texts: list[bytes], ids: list[IdArray]) -> list[int]:
        """Which of the texts ``ids`` do not give back; none where the vocabulary changes no text."""
        if self._is_exact:
            return []
        back = (self.decode_text(found.tolist()).encode() for found in ids)
        return [i for i, (text, found) in enumerate(zip(texts, back, strict=True)) if text != found]

    def spans(self, ids: Sequence[int], mask: Sequence[int]) -> list[Span]:
        """Ids as text: each special token, and each run of others that are trained or not alike."""
        marked = [(index, bool(trained)) for index, trained in zip(ids, mask, strict=True)]
        found = []
        for (special, trained), run in groupby(marked, key=lambda m: (m[0] in self.control_ids, m[1])):
            run_ids = [index for index, _ in run]
            texts = [self.pieces[i] for i in run_ids] if special else [self.decode_text(run_ids)]
            found += [Span(text, trained, special) for text in texts]
        return found
