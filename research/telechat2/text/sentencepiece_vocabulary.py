"""SentencePiece vocabularies: those of TeleChat2, and that of TeleChat v1 12B.

Markers are control symbols in TeleChat2's vocabularies. In TeleChat v1 12B's, ``<_user>`` and ``<_bot>`` are
ordinary pieces, which SentencePiece would find in what a person types; and in every vocabulary it reads
U+2581 as a blank, its own mark for one. Such text is encoded by its bytes, so that it comes back as text.
"""

import re
from collections.abc import Sequence

import numpy as np
import sentencepiece

from research.telechat2.common.errors import UsageError
from research.telechat2.text.vocabulary import MARKERS, TOOL_TAGS, USER, IdArray, Vocabulary

_BLANK_MARK = "▁".encode()  # U+2581
# Noncharacters: in no vocabulary, so that each is encoded by its three bytes and joins no neighbour.
_STAND_INS = [chr(code).encode() for code in range(0xFDD0, 0xFDF0)]


class SentencePieceVocabulary(Vocabulary):
    """``content``: that of a tokenizer.model. UsageError when it is no SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes):
        super().__init__(content)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.size = self.model.get_piece_size()
            if self.size == 0:
                raise RuntimeError("it holds no pieces")
        except RuntimeError as error:
            raise UsageError(f"{len(content):,} bytes are not a SentencePiece model ({error})") from None
        self.pieces = self.model.id_to_piece(list(range(self.size)))
        self.unknown_id = self.model.unk_id()
        controls = {*filter(self.model.is_control, range(self.size)), self.unknown_id}
        found = {self.model.piece_to_id(token): token for token in (*MARKERS, *TOOL_TAGS)}
        ordinary = {index: token for index, token in found.items() if index not in controls}
        self.control_ids = frozenset(controls | ordinary.keys())
        self.release_format = "v1" if self.special_ids.get(USER) in ordinary else "chat"
        bytes_found = (self.model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = {i: bytes([byte]) for byte, i in enumerate(bytes_found) if self.model.is_byte(i)}
        self._first_byte = min(self.byte_ids, default=None)
        # Text that SentencePiece alone would not encode literally, and what of it is written by bytes.
        self._replaced = [(_BLANK_MARK, _BLANK_MARK)]
        self._replaced += [(token.encode(), b"<") for token in ordinary.values()]
        self._needs_care = re.compile(b"|".join(re.escape(text) for text, _ in self._replaced)).search

    def encode_utf8(self, text: bytes) -> list[int]:
        """The ids of text in UTF-8. UsageError where the vocabulary has no bytes to write it with."""
        if not self._needs_care(text):
            return list(self.model.encode(text))
        if self._first_byte is None:
            raise UsageError("the text holds U+2581 or a marker, and the vocabulary has no pieces for bytes")
        stand_ins = iter([stand_in for stand_in in _STAND_INS if stand_in not in text])
        used: list[tuple[bytes, bytes]] = []
        for found, by_bytes in self._replaced:
            if found in text:
                if (stand_in := next(stand_ins, None)) is None:
                    raise UsageError("the text holds all of the noncharacters U+FDD0 to U+FDEF; remove some")
                text = text.replace(found, stand_in + found.removeprefix(by_bytes))
                used.append((stand_in, by_bytes))
        ids = np.array(self.model.encode(text), np.int32)
        for stand_in, by_bytes in used:
            ids = _put(ids, stand_in, by_bytes, self._first_byte)
        return [int(index) for index in ids]

    def encode_many(self, texts: list[bytes]) -> list[IdArray]:
        """The ids, int32, of each text in UTF-8."""
        found: list[IdArray] = self.model.encode_as_numpy(texts, num_threads=1)
        for i, text in enumerate(texts):
            if self._needs_care(text):
                found[i] = np.array(self.encode_utf8(text), np.int32)
        return found

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids among which is no control symbol."""
        return str(self.model.decode(ids))


def _put(ids: IdArray, stand_in: bytes, by_bytes: bytes, first_byte: int) -> IdArray:
    """``ids`` with the three bytes of a stand-in replaced by others; byte 0 has the id ``first_byte``."""
    first, second, third = (first_byte + byte for byte in stand_in)
    at = np.flatnonzero((ids[:-2] == first) & (ids[1:-1] == second) & (ids[2:] == third))
    for offset, byte in enumerate(by_bytes):
        ids[at + offset] = first_byte + byte
    return np.delete(ids, [at + offset for offset in range(len(by_bytes), 3)])
