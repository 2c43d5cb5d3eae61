"""TelechatTokenizer: a released vocabulary (``text/vocabulary.py``) as a tokenizer of MindFormers.

``encode_text`` takes text literally: what a user types stays text. Only ``tokenizer(text)``, which
MindFormers calls for raw prompts, reads the markers ``<_start> <_end> <_pad> <_user> <_bot> <_system>`` and
the tool tags (where the vocabulary has them) as special. Nothing is ever added to the vocabulary.
"""

import os
import re
from functools import cached_property
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write
from research.telechat2.compat.library import (
    AddedToken,
    MindFormerModuleType,
    MindFormerRegister,
    PreTrainedTokenizer,
    logger,
)
from research.telechat2.text import chat
from research.telechat2.text.load_vocabulary import load_vocabulary
from research.telechat2.text.stream_decoder import StreamDecoder
from research.telechat2.text.vocabulary import TOOL_TAGS, Vocabulary

# What MindFormers' base class reads from the keyword arguments.
_BASE_SETTINGS = {
    *("name_or_path", "processor_class", "model_max_length", "max_len", "padding_side", "truncation_side"),
    *("model_input_names", "split_special_tokens", "verbose", "sep_token", "cls_token", "mask_token"),
}


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class TelechatTokenizer(PreTrainedTokenizer):
    """Tokenizer on a ``vocabulary``.

    ``vocab_file``: path of a tokenizer.model, or of the tokenizer.json of TeleChat v1 7B, which has no system
    prompt. ``add_bos_token``, ``add_eos_token``: whether ``tokenizer(text)`` puts ``<_start>`` before and
    ``<_end>`` behind. ``whole_characters``: whether decoded text leaves out a last character of which tokens
    are missing, as an answer that is cut may have one. The markers must be in the vocabulary (UsageError);
    any other special token that is not maps to the unknown id, with one warning. Tool tags count as content:
    they stay when ``skip_special_tokens`` drops the rest. Settings of the base class (``padding_side``,
    ``model_max_length``, …) are passed on; any other is named in a warning, since it has no effect.
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
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.whole_characters = whole_characters
        markers = [str(t) for t in (bos_token, eos_token, pad_token, usr_token, bot_token, sys_token)]
        self.vocabulary: Vocabulary = load_vocabulary(vocab_file, markers)
        if unused := kwargs.keys() - _BASE_SETTINGS:
            logger.warning("TelechatTokenizer has no %s: without effect", ", ".join(sorted(unused)))
        self._warned: set[str] = set()
        super().__init__(
            unk_token=str(unk_token),
            bos_token=markers[0],
            eos_token=markers[1],
            pad_token=markers[2],
            additional_special_tokens=[
                *(token for token in markers[3:] if token in self.vocabulary.special_ids),
                *map(str, additional_special_tokens),
            ],
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        self._add_tokens([tag for tag in TOOL_TAGS if tag in self.vocabulary.special_ids])
        # What __init__ above was given, for saving: the base class records only what it was passed.
        self.init_kwargs.update(
            vocab_file=self.vocab_file, add_bos_token=add_bos_token, add_eos_token=add_eos_token
        )

    # ------------------------------------------------------------------ vocabulary
    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is below it."""
        return self.vocabulary.size

    def __len__(self) -> int:
        return self.vocabulary.size

    def get_vocab(self) -> dict[str, int]:
        """Return piece -> id, a copy."""
        return dict(self.vocabulary.ids)

    @property
    def release_format(self) -> str:
        """The prompt format of the release that has this vocabulary: v1, or chat."""
        return self.vocabulary.release_format

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        """Mark tokens of the vocabulary as never to be split; what it does not contain is not added."""
        for token in new_tokens or ():
            text = str(token)
            index = self.vocabulary.special_ids.get(text)
            if not text or index == self.vocabulary.unknown_id:
                continue  # `<_unk>` in a prompt is text; as an id it comes out of encoding only
            if index is None:
                self._warn_absent(text)
                continue
            special = index not in self.vocabulary.tool_tag_ids
            added = AddedToken(
                text, lstrip=False, rstrip=False, single_word=False, normalized=False, special=special
            )
            self._added_tokens_decoder[index] = added
            self._added_tokens_encoder[text] = index
        self.__dict__.pop("_split_pattern", None)
        return 0

    def _warn_absent(self, token: str) -> None:
        if token not in self._warned:
            self._warned.add(token)
            logger.warning(
                "%s has no control symbol %r: it is not added, its id is the unknown id %d",
                self.vocab_file, token, self.vocabulary.unknown_id,
            )  # fmt: skip

    # ------------------------------------------------------------------ text -> ids
    def encode_text(self, text: str) -> list[int]:
        """Encode ``text`` literally: ``<_end>`` in it is text. UsageError when it is not valid Unicode."""
        return self.vocabulary.encode_text(text)

    @cached_property
    def _split_pattern(self) -> re.Pattern[str]:
        markers = sorted(self._added_tokens_encoder, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, markers)) + ")")

    def tokenize(self, text, pair=None, add_special_tokens=False, split_special_tokens=False, **kwargs):
        """Return the pieces of a raw prompt, markers whole unless ``split_special_tokens``."""
        if kwargs:
            raise TypeError(f"tokenize() has no argument {', '.join(kwargs)}")
        if split_special_tokens or self.split_special_tokens:
            return self._tokenize(text)
        parts = enumerate(self._split_pattern.split(text))  # those of odd numbers are markers
        return [piece for i, part in parts if part for piece in ([part] if i % 2 else self._tokenize(part))]

    def _tokenize(self, text, **kwargs):
        return [self.vocabulary.pieces[i] for i in self.encode_text(text)]

    def _convert_token_to_id(self, token):
        return self.vocabulary.ids.get(token, self.vocabulary.unknown_id)

    def _convert_token_to_id_with_added_voc(self, token):
        return None if token is None else self._convert_token_to_id(token)

    def _convert_id_to_token(self, index):
        return self.vocabulary.pieces[index]

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
        return chat.encode(segments, self.vocabulary)[0] if tokenize else chat.conversation_text(segments)

    # ------------------------------------------------------------------ ids -> text
    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if self.whole_characters:
            text = "".join(map(StreamDecoder(self.vocabulary, skip_special_tokens).put, ids))
        else:
            text = self.vocabulary.decode(ids, skip_special_tokens)
        clean = clean_up_tokenization_spaces
        clean = self.clean_up_tokenization_spaces if clean is None else clean
        return self.clean_up_tokenization(text) if clean else text

    def convert_tokens_to_string(self, tokens):
        """Return the text of a list of pieces."""
        return self._decode([self._convert_token_to_id(token) for token in tokens])

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Write the vocabulary's file into ``save_directory``, over no other one; return ``(path,)``."""
        if not os.path.isdir(save_directory):
            raise UsageError(
                f"cannot save the vocabulary: {save_directory} is not a directory; create it first"
            )
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}{self.vocabulary.file_name}"
        if not target.exists():
            with atomic_write(target) as temporary:
                temporary.write_bytes(self.vocabulary.content)
        elif target.read_bytes() != self.vocabulary.content:
            raise UsageError(f"{target} is another vocabulary and is not overwritten; give another directory")
        return (str(target),)
