"""The small files of a checkpoint's folder: those that go along, and the tokenizer of an exported folder."""

import json
from pathlib import Path

from research.telechat2.checkpoint.relatives.chat_template import chat_template
from research.telechat2.checkpoint.relatives.description import Description
from research.telechat2.checkpoint.relatives.fast_tokenizer import tokenizer_json
from research.telechat2.checkpoint.relatives.reading import json_bytes, read_json

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
        ValueError: a vocabulary that is none, or has more ids than the model has embeddings.
    """
    if vocab_file is not None and not vocab_file.is_file():
        raise ValueError(f"{vocab_file} does not exist; give the path of the model's tokenizer.model")
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
