"""TelechatTokenizer: the released vocabularies for MindFormers, and streaming decode.

Design: the SentencePiece model is the whole vocabulary. Special tokens are the control symbols it contains,
at its own ids; nothing is ever added, so no id can fall outside the embedding. ``encode_text`` cannot
produce a control symbol: text a user types stays text. Only ``tokenizer(text)``, which MindFormers calls
for raw prompts, reads the markers ``<_start> <_end> <_pad> <_user> <_bot> <_system>`` and the tool tags
(where the vocabulary has them) as special.

U+2581 (▁), which SentencePiece reads as a blank, is encoded by its bytes, so that it comes back. TeleChat v1
12B has markers that are ordinary pieces: their ids are special here too (see ``text/literal.py``).
"""

import os
import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import sentencepiece

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write
from research.telechat2.common.placeholders import what_stands_here
from research.telechat2.compat.library import (
    AddedToken,
    MindFormerModuleType,
    MindFormerRegister,
    PreTrainedTokenizer,
    logger,
)
from research.telechat2.text import chat
from research.telechat2.text.byte_level_bpe import ByteLevelModel
from research.telechat2.text.literal import LiteralText
from research.telechat2.text.stream_decoder import StreamDecoder

__all__ = ["StreamDecoder", "TelechatTokenizer"]

# What MindFormers' base class reads from the keyword arguments.
_BASE_SETTINGS = {
    *("name_or_path", "processor_class", "model_max_length", "max_len", "padding_side", "truncation_side"),
    *("model_input_names", "split_special_tokens", "verbose", "sep_token", "cls_token", "mask_token"),
}


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class TelechatTokenizer(PreTrainedTokenizer):
    """Tokenizer on a TeleChat2 ``tokenizer.model``.

    ``vocab_file``: path of the SentencePiece model, or of the tokenizer.json of TeleChat v1 7B, which has no
    system prompt. ``add_bos_token``, ``add_eos_token``: whether
    ``tokenizer(text)`` puts ``<_start>`` before and ``<_end>`` behind. ``whole_characters``: whether decoded
    text leaves out a last character of which tokens are missing, as an answer that is cut may have one. The
    markers must be in the vocabulary (UsageError); any other special token that is not maps to the model's
    unknown id, with one warning. Tool tags count as content: they stay when ``skip_special_tokens`` drops the
    rest. Settings of the base class (``padding_side``, ``model_max_length``, …) are passed on; any other is
    named in a warning, since it has no effect.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file,
        unk_token="<_unk>",
        bos_token="<_start>",
        eos_token="<_end>",
        pad_token="<_pad>",
        usr_token="<_user>",
        bot_token="<_bot>",
        sys_token="<_system>",
        add_bos_token=False,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=(),
        whole_characters=False,
        **kwargs,
    ):
        self.vocab_file = str(vocab_file)
        self.sp_model = _load(vocab_file)
        self._literal = None if isinstance(self.sp_model, ByteLevelModel) else LiteralText(self.sp_model)
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.whole_characters = whole_characters
        markers = [bos_token, eos_token, pad_token, usr_token, bot_token, sys_token]
        if isinstance(self.sp_model, ByteLevelModel) and self.special_id(_text(sys_token)) is None:
            markers.remove(sys_token)
        self._require(markers)
        self._warned: set[str] = set()
        _warn_unused(kwargs)
        super().__init__(
            unk_token=_text(unk_token),
            bos_token=_text(bos_token),
            eos_token=_text(eos_token),
            pad_token=_text(pad_token),
            additional_special_tokens=[_text(t) for t in (*markers[3:], *additional_special_tokens)],
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        self._add_tokens([tag for tag in chat.TOOL_TAGS if tag in self._ids])
        # What __init__ above was given, for saving: the base class records only what it was passed.
        self.init_kwargs.update(
            vocab_file=self.vocab_file, add_bos_token=add_bos_token, add_eos_token=add_eos_token
        )

    # ------------------------------------------------------------------ vocabulary
    @property
    def vocab_size(self) -> int:
        """Number of pieces; every id is below it."""
        return self.sp_model.get_piece_size()

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return piece -> id, a copy."""
        return dict(self._ids)

    @cached_property
    def _ids(self) -> dict[str, int]:
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.get_piece_size())))
        return {piece: index for index, piece in enumerate(pieces)}

    @cached_property
    def _pieces(self) -> list[str]:
        return list(self._ids)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Ids that stand for no text: control symbols, markers among the other pieces, the unknown piece."""
        model = self.sp_model
        found = [i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)]
        return frozenset(found).union(self._literal.ordinary if self._literal else ())

    @cached_property
    def _byte_ids(self) -> dict[int, bytes]:
        """Ids that stand for bytes, which may be a part of a character."""
        model = self.sp_model
        if isinstance(model, ByteLevelModel):
            return model.bytes_of
        ids = (i for i in range(self.vocab_size) if model.is_byte(i))
        return {i: bytes([int(self._pieces[i][1:-1], 16)]) for i in ids}

    @cached_property
    def _content_ids(self) -> frozenset[int]:
        """Control symbols that are part of an answer: the tool tags."""
        return frozenset(self._ids[tag] for tag in chat.TOOL_TAGS if tag in self._ids)

    def special_id(self, token: str) -> int | None:
        """Return the id of a special token, None when the vocabulary has no such one."""
        index = self._ids.get(token)
        return index if index in self._control_ids else None

    def _require(self, markers: Sequence) -> None:
        for marker in markers:
            if self.special_id(_text(marker)) is None:
                some = ", ".join(self._pieces[i] for i in sorted(self._control_ids))
                raise UsageError(
                    f"{self.vocab_file} has no control symbol {_text(marker)!r}; it has {some}: this is not "
                    f"a TeleChat2 vocabulary, or the token is misspelt"
                )

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        """Mark tokens of the vocabulary as never to be split; what it does not contain is not added."""
        for token in new_tokens or ():
            text = _text(token)
            if text == self._text_of_unknown or not text:
                continue  # `<_unk>` in a prompt is text; as an id it comes out of encoding only
            if self.special_id(text) is None:
                self._warn_absent(text)
                continue
            index = self._ids[text]
            special = index not in self._content_ids
            added = AddedToken(
                text, lstrip=False, rstrip=False, single_word=False, normalized=False, special=special
            )
            self._added_tokens_decoder[index] = added
            self._added_tokens_encoder[text] = index
        self.__dict__.pop("_split_pattern", None)
        return 0

    @property
    def release_format(self) -> str:
        """The prompt format of the release that has this vocabulary: v1, or chat."""
        is_v1 = isinstance(self.sp_model, ByteLevelModel) or not self.sp_model.is_control(
            self._ids[chat.USER]
        )
        return "v1" if is_v1 else "chat"

    @property
    def _text_of_unknown(self) -> str:
        return self._pieces[self.sp_model.unk_id()]

    def _warn_absent(self, token: str) -> None:
        if token not in self._warned:
            self._warned.add(token)
            logger.warning(
                "%s has no control symbol %r: it is not added, its id is the unknown id %d",
                self.vocab_file, token, self.sp_model.unk_id(),
            )  # fmt: skip

    # ------------------------------------------------------------------ text -> ids
    def encode_text(self, text: str) -> list[int]:
        """Encode ``text`` literally: ``<_end>`` in it is text. UsageError when it is not valid Unicode."""
        try:
            return (self._literal or self.sp_model).encode(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            found = f"half of a surrogate pair (U+{code:04X})"
            if 0xDC80 <= code <= 0xDCFF:  # what Python makes of such a byte of a command line or a terminal
                found = f"the byte 0x{code - 0xDC00:02X}, which is no UTF-8,"
            raise UsageError(
                f"the text is not valid Unicode: {found} at character {error.start}; repair the text"
            ) from error

    @cached_property
    def _split_pattern(self) -> re.Pattern:
        markers = sorted(self._added_tokens_encoder, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, markers)) + ")")

    def split_markers(self, text: str) -> list[tuple[str, bool]]:
        """Split a raw prompt into (text, is a marker) parts; empty parts are left out."""
        parts = self._split_pattern.split(text)
        return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]

    def has_marker(self, text: str) -> bool:
        """Whether ``text`` contains what would be special in a raw prompt."""
        return self._split_pattern.search(text) is not None

    def tokenize(self, text, pair=None, add_special_tokens=False, split_special_tokens=False, **kwargs):
        """Return the pieces of a raw prompt, markers whole unless ``split_special_tokens``."""
        if kwargs:
            raise TypeError(f"tokenize() does not know {', '.join(kwargs)}")
        if split_special_tokens or self.split_special_tokens:
            return self._tokenize(text)
        pieces = []
        for part, is_marker in self.split_markers(text):
            pieces.extend([part] if is_marker else self._tokenize(part))
        return pieces

    def _tokenize(self, text, **kwargs):
        return [self._pieces[i] for i in self.encode_text(text)]

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self.sp_model.unk_id())

    def _convert_token_to_id_with_added_voc(self, token):
        return None if token is None else self._convert_token_to_id(token)

    def _convert_id_to_token(self, index):
        return self._pieces[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Put ``<_start>`` before and ``<_end>`` behind each sequence, as configured."""
        head = [self.bos_token_id] if self.add_bos_token else []
        tail = [self.eos_token_id] if self.add_eos_token else []
        ids = head + list(token_ids_0) + tail
        return ids if token_ids_1 is None else ids + head + list(token_ids_1) + tail

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        """Return 1 for ids that ``build_inputs_with_special_tokens`` adds (or special already), else 0."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        head, tail = [1] * bool(self.add_bos_token), [1] * bool(self.add_eos_token)
        mask = head + [0] * len(token_ids_0) + tail
        return mask if token_ids_1 is None else mask + head + [0] * len(token_ids_1) + tail

    def apply_chat_template(self, conversation, tools=None, add_generation_prompt=False, tokenize=True):
        """Render messages with the chat template: ids, or the text when ``tokenize`` is False."""
        segments = chat.render(
            conversation, tools, add_generation_prompt=add_generation_prompt, allow_empty=True
        )
        return chat.encode(segments, self)[0] if tokenize else chat.conversation_text(segments)

    # ------------------------------------------------------------------ ids -> text
    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        self.check_ids(ids)
        parts = []
        if self.whole_characters:
            decoder = StreamDecoder(self, skip_special_tokens)
            parts, ids = [decoder.put(index) for index in ids], []
        for is_control, run in groupby(ids, self._control_ids.__contains__):
            if is_control:
                parts.extend(self._pieces[i] for i in run if not self.is_skipped(i, skip_special_tokens))
            else:
                parts.append(self.sp_model.decode(list(run)))
        text = "".join(parts)
        clean = (
            self.clean_up_tokenization_spaces
            if clean_up_tokenization_spaces is None
            else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def convert_tokens_to_string(self, tokens):
        """Return the text of a list of pieces."""
        return self._decode([self._convert_token_to_id(token) for token in tokens])

    def is_skipped(self, index: int, skip_special_tokens: bool) -> bool:
        """Whether a control symbol is left out of decoded text; tool tags are content and never are."""
        return skip_special_tokens and index not in self._content_ids

    def check_ids(self, ids: Sequence[int]) -> None:
        """UsageError for an id that is no row of the embedding (such as the ignored label -100)."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            hint = "; -100 is an ignored label: leave those out" if wrong == -100 else ""
            raise UsageError(
                f"token id {wrong} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}{hint}"
            )

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Copy the SentencePiece model into ``save_directory``, over no other one; return ``(path,)``."""
        if not os.path.isdir(save_directory):
            raise UsageError(
                f"cannot save the vocabulary: {save_directory} is not a directory; create it first"
            )
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        is_json = isinstance(self.sp_model, ByteLevelModel)
        name = "tokenizer.json" if is_json else self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / f"{prefix}{name}"
        if not target.exists():
            with atomic_write(target) as temporary:
                shutil.copyfile(self.vocab_file, temporary)
        elif target.read_bytes() != Path(self.vocab_file).read_bytes():
            raise UsageError(f"{target} is another vocabulary and is not overwritten; give another directory")
        return (str(target),)


def _text(token) -> str:
    """Text of a special token given as str or AddedToken."""
    return token.content if isinstance(token, AddedToken) else str(token)


def _warn_unused(kwargs: dict) -> None:
    unused = [key for key in kwargs if key not in _BASE_SETTINGS]
    if unused:
        logger.warning("TelechatTokenizer has no %s: without effect", ", ".join(sorted(unused)))


def _load(vocab_file) -> sentencepiece.SentencePieceProcessor | ByteLevelModel:
    if not vocab_file:
        raise UsageError("vocab_file is not set; give the path of the model's tokenizer.model")
    path = Path(vocab_file)
    if path.is_dir():
        raise UsageError(f"vocab_file {path} is a directory; give the path of the tokenizer.model in it")
    if not path.is_file():
        raise UsageError(f"vocab_file {path} does not exist; give the path of the model's tokenizer.model")
    if path.name.endswith("tokenizer.json"):
        try:
            return ByteLevelModel(path.read_bytes())
        except ValueError as error:
            raise UsageError(f"vocab_file {path}: {error}; give the one released with the weights") from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        if model.get_piece_size() == 0:
            raise RuntimeError("it holds no pieces")
    except (RuntimeError, OSError, TypeError) as error:
        raise UsageError(
            f"vocab_file {path} ({path.stat().st_size:,} bytes) is not a SentencePiece model ({error}); "
            "give the tokenizer.model that was released with the weights, and check that it is complete."
            + what_stands_here(path)
        ) from error
    return model
