"""A SentencePiece vocabulary read by one rule: markers are ids, and text is text that comes back.

Markers are control symbols in TeleChat2's vocabularies. In TeleChat v1 12B's, ``<_user>`` and ``<_bot>`` are
ordinary pieces, which SentencePiece would find in what a person types; and in every vocabulary it reads
U+2581 as a blank, its own mark for one. Such text is encoded by its bytes.
"""

from collections.abc import Callable, Sequence

import numpy as np

from research.telechat2.common.errors import UsageError

MARKERS = ("<_start>", "<_end>", "<_user>", "<_bot>", "<_system>", "<_pad>")
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
BLANK_MARK = "▁"  # U+2581
# Noncharacters: in no vocabulary, so that each is encoded by its three bytes and joins no neighbour.
_STAND_INS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def marker_id(model, token: str) -> int | None:
    """The id of a special token: a control symbol, or a marker that is an ordinary piece; None without."""
    index = model.piece_to_id(token)
    if model.is_control(index):
        return index
    is_piece = token in (*MARKERS, *TOOL_TAGS) and not model.is_unknown(index)
    return index if is_piece and model.id_to_piece(index) == token else None


class LiteralText:
    """Encodes text of a SentencePiece model (``sentencepiece.SentencePieceProcessor``) literally."""

    def __init__(self, model):
        self.model = model
        found = {token: marker_id(model, token) for token in (*MARKERS, *TOOL_TAGS)}
        #: ids of markers that are ordinary pieces
        self.ordinary = {i: token for token, i in found.items() if i is not None and not model.is_control(i)}
        first = model.piece_to_id("<0x00>")
        self._first_byte = first if model.is_byte(first) else None
        self._replaced = [(BLANK_MARK.encode(), BLANK_MARK.encode())]  # text, and what of it goes by bytes
        self._replaced += [(token.encode(), b"<") for token in self.ordinary.values()]

    def needs_care(self, text: bytes) -> bool:
        """Whether plain SentencePiece would not encode ``text`` literally."""
        return any(found in text for found, _ in self._replaced)

    def encode(self, text: bytes, encode: Callable[[bytes], Sequence[int]] | None = None) -> list[int]:
        """The ids of UTF-8 text. UsageError where the vocabulary has no bytes to write it with."""
        encode = encode or self.model.encode
        if not self.needs_care(text):
            return list(encode(text))
        if self._first_byte is None:
            raise UsageError("the text holds U+2581 or a marker, and the vocabulary has no pieces for bytes")
        stand_ins = iter([c.encode() for c in _STAND_INS if c.encode() not in text])
        used: list[tuple[bytes, bytes]] = []
        for found, by_bytes in self._replaced:
            if found in text:
                if (stand_in := next(stand_ins, None)) is None:
                    raise UsageError("the text holds all of the noncharacters U+FDD0 to U+FDEF; remove some")
                text = text.replace(found, stand_in + found.removeprefix(by_bytes))
                used.append((stand_in, by_bytes))
        ids = np.array(encode(text), np.int32)
        for stand_in, by_bytes in used:
            ids = self._put(ids, stand_in, by_bytes)
        return ids.tolist()

    def _put(self, ids: np.ndarray, stand_in: bytes, by_bytes: bytes) -> np.ndarray:
        """``ids`` with the bytes of a stand-in replaced by others."""
        first, second, third = (self._first_byte + byte for byte in stand_in)
        at = np.flatnonzero((ids[:-2] == first) & (ids[1:-1] == second) & (ids[2:] == third))
        kept = np.ones(len(ids), bool)
        for offset in range(3):
            if offset < len(by_bytes):
                ids[at + offset] = self._first_byte + by_bytes[offset]
            else:
                kept[at + offset] = False
        return ids[kept]
