"""Byte-level BPE vocabularies: the tokenizer.json of TeleChat v1 7B.

Read through the ``tokenizers`` library that transformers stands on. Its markers are taken out of it, so that
encoding is literal; they are control symbols here. ``<pad>`` and ``<unk>`` of v1 have TeleChat2's names.
"""

import json
from collections.abc import Sequence

from research.telechat2.common.errors import UsageError
from research.telechat2.text.vocabulary import SYSTEM, Vocabulary

_UNKNOWN = "<_unk>"
_RENAMED = {"<pad>": "<_pad>", "<unk>": _UNKNOWN}


class ByteLevelVocabulary(Vocabulary):
    """``content``: that of a tokenizer.json. UsageError when it is no byte-level BPE."""

    file_name = "tokenizer.json"
    optional = frozenset({SYSTEM})
    release_format = "v1"

    def __init__(self, content: bytes):
        from tokenizers import Tokenizer

        self.content = content
        try:
            settings = json.loads(content)
            added = {entry["content"]: entry["id"] for entry in settings["added_tokens"]}
            vocabulary = settings["model"]["vocab"] | added
            bare = dict.fromkeys(("truncation", "padding", "post_processor")) | {"added_tokens": []}
            self._encoder = Tokenizer.from_str(json.dumps(settings | bare))
        except Exception as error:  # the library raises Exception itself
            raise UsageError(f"it is not a tokenizer.json of BPE ({error})") from None
        names = {index: name for name, index in vocabulary.items()}
        self.size = max(names, default=-1) + 1
        pieces = [names.get(index, f"<unused{index}>") for index in range(self.size)]
        self.pieces = [
            renamed if (renamed := _RENAMED.get(name)) and renamed not in vocabulary else name
            for name in pieces
        ]
        if _UNKNOWN not in self.pieces:
            raise UsageError(f"it has neither <unk> nor {_UNKNOWN}, which every TeleChat vocabulary has")
        self.unknown_id = self.pieces.index(_UNKNOWN)
        unused = set(range(self.size)) - names.keys()
        self.control_ids = frozenset({*added.values(), *unused, self.unknown_id})
        foreign = {c for i in names.keys() - self.control_ids for c in names[i]} - _BYTE_OF.keys()
        if foreign:
            raise UsageError(f"it is not byte-level: its pieces hold {', '.join(sorted(foreign)[:5])}")
        self.byte_ids = {
            index: bytes(_BYTE_OF[character] for character in names[index])
            for index in names.keys() - self.control_ids
        }

    def encode_utf8(self, text: bytes) -> list[int]:
        """The ids of text in UTF-8."""
        return list(self._encoder.encode(text.decode(), add_special_tokens=False).ids)

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids among which is no control symbol."""
        data, text = b"".join(self.byte_ids[index] for index in ids), ""
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
