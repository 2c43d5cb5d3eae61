"""What MindIE meets: settings, model and tokenizer as ``mindformers.model_runner`` builds and calls them.

MindIE gives a prefill the prompts' tokens one after the other, ``[1, T]``, and a decode step one token of
each row, ``[B, 1]``; MindFormers' own ``generate``, which the model is written for, gives padded rows.
"""

from pathlib import Path

import numpy as np

from research.telechat2.common.errors import UsageError
from research.telechat2.compat.library import MindFormerModuleType, MindFormerRegister, logger
from research.telechat2.infer.telechat import ParallelTelechatForCausalLM
from research.telechat2.serve.mindie.copied_code import check_code
from research.telechat2.telechat_config import TelechatConfig
from research.telechat2.telechat_tokenizer import TelechatTokenizer
from research.telechat2.text.chat import conversation_text, encode, render
from research.telechat2.text.prompt_format import check

_CHAT_SETTINGS = ("tools", "add_generation_prompt")  # what is read of all that a client sends


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class MindIETelechatConfig(TelechatConfig):
    """TelechatConfig with what ModelRunner adds to it.

    ``npu_mem_size``: GB of the cache on the NPU, from which ModelRunner has counted ``num_blocks``, a whole
    number of any type. ``checkpoint_path``: the YAML's ``load_checkpoint``.
    """

    def __init__(self, npu_mem_size=None, checkpoint_path=None, num_blocks=512, **settings):
        super().__init__(num_blocks=int(num_blocks), **settings)
        self.npu_mem_size = npu_mem_size
        self.checkpoint_path = checkpoint_path


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class MindIETelechatForCausalLM(ParallelTelechatForCausalLM):
    """ParallelTelechatForCausalLM as MindIE calls it, on one NPU or several."""

    config_class = MindIETelechatConfig

    def __init__(self, config: MindIETelechatConfig):
        if not config.checkpoint_path:  # ModelRunner would continue with random weights
            raise UsageError("the folder's YAML names no load_checkpoint; set it to the weights to serve.")
        super().__init__(config)

    def prepare_inputs_for_predict_layout(self, input_ids, **kwargs):
        """Nothing: MindFormers would compile a graph from it to cut the weights, which load_weights does."""

    def forward(self, input_ids, valid_length_each_example, *, prefill=None, **kwargs):
        """Logits of one step from MindIE's layout of the tokens, and each row's index among them.

        With DYNAMIC_NTK a request has the factor of its prompt, in whole blocks, or with ``extend_by_prompt``
        as it is: MindIE does not say how long the answer may become, and cuts the block tables of a prefill
        to the longest prompt of the batch, on which no other row may depend. It is chosen here, before
        ``prefill_chunk`` makes pieces of the prompts.
        """
        if kwargs.get("spec_mask") is not None:
            raise UsageError(
                "MindIE asks for speculative decoding, which TeleChat2 does not do; remove plugin_params "
                "from its conf/config.json."
            )
        lengths = np.asarray(valid_length_each_example)
        if prefill:
            input_ids = prompt_rows(np.reshape(input_ids, (-1, np.shape(input_ids)[-1])), lengths)
            if kwargs.get("longest") is None and not self.config.extend_by_prompt:  # generate knows it
                kwargs["longest"] = -(-lengths // self.config.block_size) * self.config.block_size
        return super().forward(input_ids, lengths, prefill=prefill, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Inputs of one step from the rows of a prefill, or from one token of each row of a decode step."""
        input_ids = np.asarray(input_ids)
        if not kwargs["prefill"]:
            input_ids = newest_rows(input_ids, np.asarray(kwargs["valid_length_each_example"]))
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def kvcache(self, layer: int):
        """The caches of a layer, keys and values, which MindIE swaps to the host and back."""
        attention = self.model.layers[layer].attention.paged_attention
        return attention.key_cache, attention.value_cache


def prompt_rows(input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Prompts ``[1, T]`` one after the other as padded rows ``[B, max(lengths)]``; rows stay as they are."""
    if input_ids.shape[0] == len(lengths) and input_ids.shape[1] >= lengths.max():
        return input_ids
    if input_ids.size != lengths.sum():
        raise UsageError(
            f"a prefill has {input_ids.size} tokens of prompts of {lengths.sum()}; remove plugin_params "
            "(prefix cache, split prefill) from MindIE's conf/config.json, and set templateType to Standard."
        )
    rows = np.zeros((len(lengths), lengths.max()), input_ids.dtype)
    rows[np.arange(lengths.max()) < lengths[:, None]] = input_ids.reshape(-1)
    return rows


def newest_rows(input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """One token of each row, ``[B, 1]``, as rows that hold it at every place; whole rows stay as they are."""
    if input_ids.shape[0] == len(lengths) and input_ids.shape[1] > 1:
        return input_ids
    return np.broadcast_to(input_ids.reshape(-1, 1), (len(lengths), lengths.max()))


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class MindIETelechatTokenizer(TelechatTokenizer):
    """TelechatTokenizer that renders conversations in the format the model was tuned with.

    ``prompt_format``: "chat", "plain" or "v1"; by default that of the vocabulary's release.
    ``chat_template``: must be set for MindIE; conversations are rendered by our own renderer, for which
    markers in a message are text. What MindFormers asks of tokenizers of other kinds is dropped.
    """

    FILE_LIST = ["tokenizer_config.json"]

    def __init__(self, vocab_file, prompt_format=None, chat_template="telechat", **settings):
        for name in ("use_fast", "trust_remote_code"):
            settings.pop(name, None)
        check_code(Path(vocab_file).parent)
        super().__init__(vocab_file, **settings)
        self.prompt_format = check(prompt_format or self.release_format)
        self.chat_template = chat_template

    def apply_chat_template(self, conversation, *, tokenize=True, chat_template_kwargs=None, **settings):
        """Ids of a conversation, or its text with ``tokenize=False``.

        A client's settings that mean nothing here are named in a warning, once.
        """
        asked = {**settings, **(chat_template_kwargs or {})}
        for name in asked.keys() - set(_CHAT_SETTINGS) - self._warned:
            self._warned.add(name)
            logger.warning("a client's chat setting %s has no meaning for TeleChat2 and is ignored", name)
        known = {name: asked[name] for name in _CHAT_SETTINGS if name in asked}
        segments = render(conversation, prompt_format=self.prompt_format, allow_empty=True, **known)
        return encode(segments, self.vocabulary)[0] if tokenize else conversation_text(segments)
