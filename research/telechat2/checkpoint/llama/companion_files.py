"""The small files of a checkpoint's folder: those that go along, and the tokenizer of an exported folder."""

import json
from pathlib import Path

import yaml

from research.telechat2.checkpoint.llama.config_values import json_bytes, read_json
from research.telechat2.checkpoint.llama.description import (
    Description,
    describe_telechat,
    lost_ids,
    model_section,
)
from research.telechat2.checkpoint.llama.fast_tokenizer import tokenizer_json
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.table import Side
from research.telechat2.common.errors import UsageError
from research.telechat2.text.jinja_template import chat_template
from research.telechat2.text.sentencepiece_vocabulary import SentencePieceVocabulary
from research.telechat2.text.vocabulary import BOT, USER

MODEL, FAST, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *(MODEL, FAST, SETTINGS, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
CODE = (
    "configuration_telechat*.py",
    "modeling_telechat*.py",
    "tokenization_telechat*.py",
    "generation_utils.py",
)


YAMLS = ("predict.yaml", "finetune.yaml")


# What the YAMLs leave to the config.json beside the weights, see config/release.py.
_OF_CONFIG = ("rms_norm_eps", "theta", "extend_method", "scaling_factor")


def yaml_files(description: Description, vocabulary: bytes | None = None) -> dict[str, bytes]:
    """predict.yaml and finetune.yaml of a model: name -> content.

    They state sizes and ids; epsilon and rotary base are read from the config.json beside the weights.
    ``vocabulary``: the tokenizer.model of a Llama, which MindFormers' own LlamaTokenizer reads in prediction.
    """
    section = {key: value for key, value in model_section(description).items() if key not in _OF_CONFIG}
    finetune, predict = dict(section), dict(section)
    if description.origin == "llama":
        end = predict.get("eos_token_id", 0)
        ends = end if isinstance(end, list) else [end]
        padding = finetune.get("pad_token_id", -1)
        if padding < 0 or padding in ends:
            finetune["pad_token_id"] = -1  # no token is padding, and all that no label excludes are trained
            predict["pad_token_id"] = ends[0]  # lengths do not depend on it, see generation/padding.py
    sections = {"finetune": {"model": {"model_config": finetune}}}
    sections["predict"] = {"model": {"model_config": predict}}
    if description.origin == "llama" and vocabulary is not None and (own := _llama_tokenizer(vocabulary)):
        sections["predict"]["processor"] = {"tokenizer": own}
    kind = "a Llama model" if description.origin == "llama" else "a TeleChat model"
    head = f"# Written with the weights from config.json: {kind} of {description.sizes.num_layers} layers.\n"
    return {
        f"{name}.yaml": (
            f"{head}base_config: telechat2-base/{name}.yaml\n\n"
            f"{yaml.safe_dump(section, sort_keys=False, allow_unicode=True)}"
        ).encode()
        for name, section in sections.items()
    }


def _llama_tokenizer(vocabulary: bytes) -> dict | None:
    """The settings of MindFormers' LlamaTokenizer; None for the vocabulary of an exported TeleChat model."""
    try:
        known = SentencePieceVocabulary(vocabulary)
    except UsageError as error:
        raise UsageError(f"the tokenizer.model beside the weights: {error}") from None
    if {USER, BOT} <= known.special_ids.keys():
        return None
    start, end, unknown = (
        known.pieces[index] for index in (known.model.bos_id(), known.model.eos_id(), known.unknown_id)
    )
    return {
        "type": "LlamaTokenizer",
        "bos_token": start,
        "eos_token": end,
        "unk_token": unknown,
        "pad_token": end,
    }


def telechat_files(
    config: Path, sizes: TelechatSizes, side: Side
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Small files for the folder of converted weights, beside config.json, and notes on them.

    ``config`` is where the source's config.json would be, ``side`` which names the source has. Those files go
    along that the other side needs later; MindSpore weights of TeleChat v1 get YAMLs, since none is shipped.

    Raises:
        UsageError: the config asks for what no TeleChat model here has.
    """
    files = companions(config.parent)
    notes = (f"{', '.join(files)} go along too",) if files else ()
    notes += vocabulary_notes(files, sizes.vocab_size)
    content = read_json(config)
    if content is None:
        return files, notes
    try:
        description = describe_telechat(content, read_json(config.parent / GENERATION), sizes)
    except UsageError as error:
        raise UsageError(f"{config}: {error}") from None
    notes += (f"rotary base {description.theta:.8g}, up to {description.seq_length:,} tokens",)
    if description.origin == "telechat v1" and side == "torch":
        yamls = yaml_files(description)
        notes += (f"{' and '.join(yamls)} run this model, TeleChat v1", *lost_ids(description))
        return files | yamls, notes
    return files, notes


def companions(
    folder: Path, patterns: tuple[str, ...] = (GENERATION, *TOKENIZER_FILES, *CODE)
) -> dict[str, bytes]:
    """Name -> content of the small files in a checkpoint's folder that belong to the model in every form.

    The code of a release is among them: its tokenizer and model need it in ``transformers``.
    """
    files = (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())
    return {file.name: file.read_bytes() for file in files}


def vocabulary_notes(files: dict[str, bytes], vocab_size: int) -> tuple[str, ...]:
    """Notes on a tokenizer.model that goes along with weights of ``vocab_size`` rows."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=files[MODEL]).get_piece_size()
    except (KeyError, RuntimeError):  # none, or no SentencePiece
        return ()
    if pieces <= vocab_size:
        return ()
    return (
        f"warning: {MODEL} has {pieces} pieces, but the embedding {vocab_size} rows; prediction and training "
        "refuse this vocabulary",
    )


def exported_tokenizer(
    folder: Path, vocab_file: Path | None, description: Description, prompt_format: str | None
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The tokenizer of an exported Llama folder, and notes on it: files that ``AutoTokenizer`` loads.

    It is that of ``vocab_file``, by default of ``folder``. A SentencePiece model with TeleChat's markers is
    written as tokenizer.json too, with the chat template of ``prompt_format`` (chat, plain; None: v1 for such
    a model, else chat); any other tokenizer goes along as it is.

    Raises:
        UsageError: a vocabulary that is none, or has more ids than the model has embeddings.
    """
    if vocab_file is not None and not vocab_file.is_file():
        raise UsageError(f"{vocab_file} does not exist; give the path of the model's tokenizer.model")
    file = vocab_file or folder / MODEL
    prompt_format = prompt_format or ("v1" if description.origin == "telechat v1" else "chat")
    if file.is_file() and file.suffix == ".model" and description.origin != "llama":
        content, notes = tokenizer_json(file, description.sizes.vocab_size)
        settings = _settings(description, prompt_format, content)
        files = {MODEL: file.read_bytes(), FAST: content, SETTINGS: json_bytes(settings)}
        return files, (*notes, f"tokenizer of {file}, with the chat template of the {prompt_format} format")
    files = companions(file.parent, TOKENIZER_FILES)
    if not files:
        return {}, (f"no tokenizer: there is none in {folder}; --vocab_file_path names one",)
    if description.origin != "llama" and FAST in files:
        settings = read_json(file.parent / SETTINGS) or {}
        if "chat_template" not in settings and "chat_template.jinja" not in files:
            files[SETTINGS] = json_bytes(settings | {"chat_template": chat_template(prompt_format)})
            return files, (
                f"tokenizer of {file.parent}, with the chat template of the {prompt_format} format",
            )
    return files, (f"tokenizer of {file.parent}, unchanged",)


def _settings(description: Description, prompt_format: str, fast: bytes) -> dict:
    special = [token["content"] for token in json.loads(fast)["added_tokens"] if token["special"]]
    named = {"bos_token": "<_start>", "eos_token": "<_end>", "pad_token": "<_pad>"}
    named = {key: token for key, token in named.items() if token in special}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [token for token in special if token not in named.values()],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": description.seq_length,
        "chat_template": chat_template(prompt_format),
    }


def generation_config(folder: Path, description: Description) -> dict[str, bytes]:
    """generation_config.json: that of ``folder``, or one with the ids alone, which decodes greedily."""
    found = companions(folder, (GENERATION,))
    ids = {key: value for key, value in description.ids.items() if value is not None}
    return found or {GENERATION: json_bytes(ids | {"do_sample": False})}
