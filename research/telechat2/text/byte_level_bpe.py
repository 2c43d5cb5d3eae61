"""Byte-level BPE vocabularies, TeleChat v1 7B's tokenizer.json, with the methods of a SentencePiece model.

Read through the ``tokenizers`` library that transformers stands on. Its markers are taken out of it, so that
``encode`` is literal, as SentencePiece's is; they are control symbols here. What v1 calls ``<pad>`` and
``<unk>`` has TeleChat2's names.
"""

import json
from collections.abc import Sequence
from functools import cached_property

from research.telechat2.common.errors import UsageError

_RENAMED = {"<pad>": "<_pad>", "<unk>": "<_unk>"}


class ByteLevelModel:
    """``content``: that of a tokenizer.json. UsageError when it is no byte-level BPE."""

    def __init__(self, content: bytes):
        from tokenizers import Tokenizer

        try:
            settings = json.loads(content)
            added = {entry["content"]: entry["id"] for entry in settings["added_tokens"]}
            vocabulary = settings["model"]["vocab"] | added
            bare = settings | {
                "added_tokens": [],
                "truncation": None,
                "padding": None,
                "post_processor": None,
            }
            self._encoder = Tokenizer.from_str(json.dumps(bare))
        except Exception as error:  # the library raises Exception itself
            raise UsageError(f"it is not a tokenizer.json of BPE ({error})") from None
        names = {index: name for name, index in vocabulary.items()}
        self._pieces = [names.get(index, f"<unused{index}>") for index in range(max(names) + 1)]
        self._pieces = [
            renamed if (renamed := _RENAMED.get(name)) and renamed not in vocabulary else name
            for name in self._pieces
        ]
        if "<_unk>" not in self._pieces:
            raise UsageError("it has neither <unk> nor <_unk>, one of which every TeleChat vocabulary has")
        self._control = frozenset(added.values()) | set(range(len(self._pieces))) - names.keys()
        foreign = {c for i in names.keys() - self._control for c in names[i]} - _BYTE_OF.keys()
        if foreign:
            raise UsageError(f"it is not byte-level: its pieces hold {', '.join(sorted(foreign)[:5])}")

    def get_piece_size(self) -> int:
        """Number of ids; every id is below it."""
        return len(self._pieces)

    def id_to_piece(self, ids: list[int]) -> list[str]:
        """The pieces of ids."""
        return [self._pieces[index] for index in ids]

    def is_control(self, index: int) -> bool:
        """Whether an id stands for no text: a marker, or an id that nothing uses."""
        return index in self._control

    def is_unknown(self, index: int) -> bool:
        """Whether an id is that of unknown text, which bytes never are."""
        return index == self.unk_id()

    def unk_id(self) -> int:
        """The id of ``<_unk>``."""
        return self._pieces.index("<_unk>")

    def encode(self, text: bytes) -> list[int]:
        """The ids of UTF-8 text, in which nothing is a marker."""
        return self._encoder.encode(text.decode(), add_special_tokens=False).ids

    @cached_property
    def bytes_of(self) -> dict[int, bytes]:
        """The bytes that each id stands for, control symbols left out."""
        return {
            index: bytes(_BYTE_OF[character] for character in piece)
            for index, piece in enumerate(self._pieces)
            if index not in self._control
        }

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; each byte that is no UTF-8 becomes a replacement character."""
        data, text = b"".join(self.bytes_of[index] for index in ids), ""
        while data:
            try:
                return text + data.decode()
            except UnicodeDecodeError as error:
                text += data[: error.start].decode() + "\ufffd"
                data = data[error.start + 1 :]
        return text


def _characters() -> dict[str, int]:
    """Byte-level BPE writes a byte as its Latin-1 character where that is visible, else as U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _characters()
