"""A SentencePiece vocabulary of the family as tokenizer.json: the same ids from any Hugging Face tool.

transformers' own conversion of such a model makes its digits and line ends "added tokens", before and after
which it puts spaces that SentencePiece does not. Here they are cut out of the text, after the one space that
begins it, and the pieces between are merged in the order of their scores, as SentencePiece does. U+2581 that
somebody types is read as a blank, as SentencePiece alone reads it: tokenizer.json cannot tell them apart.
"""

import json
import re
from pathlib import Path
from typing import Any

from research.telechat2.common.errors import UsageError
from research.telechat2.text.vocabulary import MARKERS, TOOL_TAGS

_NORMAL, _USER_DEFINED = 1, 4  # SentencePiece's types of pieces
_SPACE = "▁"


def tokenizer_json(vocab_file: Path, vocab_size: int) -> tuple[bytes, tuple[str, ...]]:
    """The content of tokenizer.json for a SentencePiece BPE model with TeleChat's markers, and notes on it.

    Raises:
        UsageError: it is no such model, it has more than ``vocab_size`` ids, or it changes text in ways that
            have no counterpart.
    """
    model = _read(vocab_file)
    pieces = {piece.piece: index for index, piece in enumerate(model.pieces)}
    if len(pieces) > vocab_size:
        raise UsageError(
            f"{vocab_file} has {len(pieces)} ids, but the model has embeddings for {vocab_size}; give the "
            "tokenizer.model that belongs to it"
        )
    lacking = [token for token in ("<_end>", "<_user>", "<_bot>") if token not in pieces]
    if lacking:
        raise UsageError(
            f"{vocab_file} has no {', '.join(lacking)}; expected the tokenizer.model of a TeleChat model"
        )
    # Those of TeleChat v1 12B are ordinary pieces, and special here too: see SentencePieceVocabulary.
    markers = sorted({*MARKERS, *TOOL_TAGS} & pieces.keys(), key=pieces.__getitem__)
    symbols = [p.piece for p in model.pieces if p.type == _USER_DEFINED and p.piece not in markers]
    bpe, exact = _bpe(model, pieces, symbols)
    spelled_out = [] if exact else [symbol for symbol in symbols if set(symbol) != {"_"} and len(symbol) > 1]
    notes = [f"tokenizer.json reads {s} and {len(spelled_out) - 1} more as text" for s in spelled_out[:1]]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(pieces[token], token, special=token in MARKERS) for token in markers],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([{"type": "Prepend", "prepend": _SPACE}] if model.normalizer_spec.add_dummy_prefix else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": _isolate(symbols),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": bpe,
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), tuple(notes)


def _read(vocab_file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as pb2

    model = vars(pb2)["ModelProto"]()  # which its builder adds to the module
    try:
        model.ParseFromString(vocab_file.read_bytes())
    except DecodeError as error:
        raise UsageError(f"{vocab_file} is not a SentencePiece model ({error})") from None
    spec = model.normalizer_spec
    if model.trainer_spec.model_type != 2 or spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise UsageError(
            f"{vocab_file} is not a BPE model that takes text as it is; expected the tokenizer.model of a "
            "TeleChat release, or one trained as examples/train_tokenizer.py does"
        )
    return model


def _bpe(model: Any, pieces: dict[str, int], symbols: list[str]) -> tuple[dict[str, Any], bool]:
    """The model section, and whether its merges lead to every piece.

    If so, a stretch of text that is a piece may be looked up whole, as a symbol that was cut out has to be.
    If not, symbols are put together by merges, as far as their beginnings are symbols too.
    """
    from tokenizers.models import BPE

    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = []
    for among in (dict.fromkeys(symbols, 0.0), normal):
        for piece in sorted(among, key=lambda piece: (-among[piece], len(piece))):
            splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
            merges += [split for split in splits if split[0] in among and split[1] in among]
    bpe = BPE(vocab=pieces, merges=merges, byte_fallback=True)
    exact = all(len(bpe.tokenize(piece)) == 1 for piece in normal)
    content = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": exact,
        "vocab": pieces,
        "merges": merges,
    }
    return content, exact


def _isolate(symbols: list[str]) -> dict[str, Any] | None:
    if not symbols:
        return None
    longest_first = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
    return {"type": "Split", "pattern": {"Regex": longest_first}, "behavior": "Isolated", "invert": False}


def _added(index: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **flags, "special": special}
