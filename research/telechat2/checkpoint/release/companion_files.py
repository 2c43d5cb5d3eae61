"""The small files of a checkpoint's folder: those that go along, and the tokenizer of an exported folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from research.telechat2.checkpoint.plan import Plan
from research.telechat2.checkpoint.release.description import (
    Description,
    describe_telechat,
    lost_ids,
    model_section,
    token_ids,
)
from research.telechat2.checkpoint.release.fast_tokenizer import tokenizer_json
from research.telechat2.checkpoint.sizes import CONFIG, TelechatSizes, config_beside
from research.telechat2.checkpoint.table import Side
from research.telechat2.common.errors import UsageError, naming
from research.telechat2.common.files import json_bytes, read_json
from research.telechat2.text import prompt_format as prompt_formats
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


def _llama_tokenizer(vocabulary: bytes) -> dict[str, str] | None:
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


def small_files(source: Path, target: Path, folder: Path) -> dict[str, bytes]:
    """What goes along with weights in every form: the config, and which prompts they were tuned with.

    A folder gets ``config.json``; a single file a config of its own, named after it, see config_beside.
    """
    beside = {}
    if (config := config_beside(source)) is not None:
        beside[config_name(target, folder)] = _config_content(config, alone=folder != target)
    return beside | prompt_format_file(prompt_formats.find(source), folder)


def prompt_format_file(prompt_format: str | None, folder: Path) -> dict[str, bytes]:
    """The file that records the prompt format, where one is known; UsageError if ``folder`` says another."""
    if prompt_format is None:
        return {}
    record = folder / prompt_formats.FILE_NAME
    if not record.exists():
        return {record.name: json_bytes({"prompt_format": prompt_format})}
    prompt_formats.write(folder, prompt_format)
    return {record.name: record.read_bytes()}


def config_name(target: Path, folder: Path) -> str:
    """The name of the config of what is written to ``target``, which is ``folder`` or a file in it."""
    return CONFIG if folder == target else f"{target.name}.{CONFIG}"


def _config_content(config: Path, alone: bool) -> bytes:
    """The bytes of a config.json; ``alone``: with the ids of the generation_config.json that stays behind."""
    content, generation = read_json(config), read_json(config.parent / GENERATION) if alone else None
    if content is None or generation is None:
        return config.read_bytes()
    ids = {key: value for key, value in token_ids(content, generation).items() if value is not None}
    return config.read_bytes() if ids.items() <= content.items() else json_bytes(content | ids)


def model_notes(plan: Plan, kind: str = "", ignored: Mapping[str, int] | None = None) -> list[str]:
    """Lines of a summary: the model, and what is left out."""
    left_out = ", ".join(f"{count} {what}" for what, count in (ignored or plan.ignored).items())
    tied = ", output layer tied to the embeddings" if plan.sizes.tie_word_embeddings else ""
    return [f"model: {kind}{plan.sizes.describe()}{tied}", f"left out: {left_out or 'nothing'}"]


def notes_of(plan: Plan, source: Path, target: Path, folder: Path) -> list[str]:
    """``model_notes``, and lines on the small files of ``small_files``."""
    lines, config = model_notes(plan), config_name(target, folder)
    if config_beside(source) is not None:
        lines.append(f"config.json goes along with the weights{'' if config == CONFIG else f', as {config}'}")
    if prompt_format := prompt_formats.find(source):
        lines.append(f"prompt format recorded with the weights: {prompt_format}")
    return lines


def telechat_files(source: Path, sizes: TelechatSizes, side: Side) -> tuple[dict[str, bytes], list[str]]:
    """Small files for the folder of converted weights, beside those of ``small_files``, and notes on them.

    ``side``: which names the source has. Those files go along that the other side needs later; MindSpore
    weights of TeleChat v1 get YAMLs, since none is shipped.

    Raises:
        UsageError: the config asks for what no TeleChat model here has.
    """
    config = config_beside(source) or (source if source.is_dir() else source.parent) / CONFIG
    files = companions(config.parent)
    notes = [f"{', '.join(files)} go along too"] if files else []
    notes += vocabulary_notes(files, sizes.vocab_size)
    content = read_json(config)
    if content is None:
        return files, notes
    with naming(config):
        description = describe_telechat(content, read_json(config.parent / GENERATION), sizes)
    notes.append(f"rotary base {description.theta:.8g}, up to {description.seq_length:,} tokens")
    if description.origin == "telechat v1" and side == "torch":
        yamls = yaml_files(description)
        notes += [f"{' and '.join(yamls)} run this model, TeleChat v1", *lost_ids(description)]
        files |= yamls
    return files, notes


def companions(
    folder: Path, patterns: Sequence[str] = (GENERATION, *TOKENIZER_FILES, *CODE)
) -> dict[str, bytes]:
    """Name -> content of the small files in a checkpoint's folder that belong to the model in every form.

    The code of a release is among them: its tokenizer and model need it in ``transformers``.
    """
    files = (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())
    return {file.name: file.read_bytes() for file in files}


def vocabulary_notes(files: Mapping[str, bytes], vocab_size: int) -> list[str]:
    """Notes on a tokenizer.model that goes along with weights of ``vocab_size`` rows."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=files[MODEL]).get_piece_size()
    except (KeyError, RuntimeError):  # none, or no SentencePiece
        return []
    if pieces <= vocab_size:
        return []
    return [
        f"warning: {MODEL} has {pieces} pieces, but the embedding {vocab_size} rows; prediction and training "
        "refuse this vocabulary"
    ]


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


def _settings(description: Description, prompt_format: str, fast: bytes) -> dict[str, Any]:
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
