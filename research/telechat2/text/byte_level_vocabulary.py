"""Byte-level BPE vocabularies: the tokenizer.json of TeleChat v1 7B.

Read through the ``tokenizers`` library that transformers stands on. Its markers are taken out of it, so that
encoding is literal; they are control symbols here. ``<pad>`` and ``<unk>`` of v1 have TeleChat2's names.
"""

import json
from collections.abc import Sequence

from research.telechat2.common.errors import UsageError
from research.telechat2.text.vocabulary import EACH_BYTE, SYSTEM, Vocabulary

_UNKNOWN = "<_unk>"
_RENAMED = {"<pad>": "<_pad>", "<unk>": _UNKNOWN}


class ByteLevelVocabulary(Vocabulary):
    """``content``: that of a tokenizer.json. UsageError when it is no byte-level BPE."""

    file_name = "tokenizer.json"
    optional = frozenset({SYSTEM})
    release_format = "v1"

    def __init__(self, content: bytes):
        from tokenizers import Tokenizer

        super().__init__(content)
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
        renamed = {old: new for old, new in _RENAMED.items() if new not in vocabulary}
        pieces = [names.get(index, f"<unused{index}>") for index in range(self.size)]
        self.pieces = [renamed.get(name, name) for name in pieces]
        if _UNKNOWN not in self.pieces:
            raise UsageError(f"it has neither <unk> nor {_UNKNOWN}, which every TeleChat vocabulary has")
        self.unknown_id = self.pieces.index(_UNKNOWN)
        unused = set(range(self.size)) - names.keys()
        self.control_ids = frozenset({*added.values(), *unused, self.unknown_id})
        texts = {index: name for index, name in names.items() if index not in self.control_ids}
        if foreign := set("".join(texts.values())) - _BYTE_OF.keys():
            raise UsageError(f"it is not byte-level: its pieces hold {', '.join(sorted(foreign)[:5])}")
        self.byte_ids = {index: bytes(_BYTE_OF[c] for c in name) for index, name in texts.items()}

    def encode_utf8(self, text: bytes) -> list[int]:
        """The ids of text in UTF-8."""
        return list(self._encoder.encode(text.decode(), add_special_tokens=False).ids)

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids among which is no control symbol."""
        return b"".join(self.byte_ids[index] for index in ids).decode(errors=EACH_BYTE)


def _characters() -> dict[str, int]:
    """Byte-level BPE writes a byte as its Latin-1 character where that is visible, else as U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _characters()
