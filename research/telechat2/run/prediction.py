"""What run_mindformer.py looks at before MindFormers predicts: vocabulary, and length of the prompts."""

import re
from pathlib import Path
from types import SimpleNamespace

from research.telechat2.common.errors import UsageError
from research.telechat2.config.evaluation import has_weights
from research.telechat2.config.fields import defaults_of
from research.telechat2.config.generation_limits import GenerationLimits
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.sharing import PARALLEL_MODEL
from research.telechat2.data.formats import holds_data, read_lines
from research.telechat2.data.same_vocabulary import check_pieces
from research.telechat2.data.sources import DATA_FILE
from research.telechat2.infer.sources import check_vocabulary, exists, numbered
from research.telechat2.text.messages import is_blank, without_byte_order_marks

TOKENIZER = "TelechatTokenizer"
_FILE_NAME = re.compile(r"[^\s<>?]+\.(txt|text|csv|jsonl|ndjson|json)(\.(gz|zst))?", re.IGNORECASE)


def check_vocab_file(config: dict) -> None:
    """Refuse a missing vocabulary before the slow imports; ``config`` is the raw YAML with overrides.

    Raises:
        UsageError: no ``processor.tokenizer.vocab_file``, or there is no such file.
    """
    if not config.get("processor"):
        raise UsageError("the config has no section processor, as one of training; use a predict YAML.")
    vocab_file = (config["processor"].get("tokenizer") or {}).get("vocab_file")
    if not vocab_file:
        raise UsageError(
            "the config names no vocab_file; give --processor.tokenizer.vocab_file tokenizer.model."
        )
    if not Path(vocab_file).is_file():
        raise UsageError(f"processor.tokenizer.vocab_file is {vocab_file}, but there is no such file.")


def check_request(config: dict) -> None:
    """Refuse a prediction without weights or by an impossible batch; ``config`` as for check_vocab_file.

    Raises:
        UsageError: no ``load_checkpoint``, or a ``predict_batch_size`` below 1.
    """
    if not has_weights(config):
        raise UsageError(
            "no weights to predict with: give --load_checkpoint, a .safetensors or .ckpt file or a "
            "directory. Answers of random weights are noise."
        )
    if (size := config.get("predict_batch_size")) is not None and size < 1:
        raise UsageError(f"predict_batch_size is {size}; it must be a whole number of at least 1.")


def keep_top_k(config) -> None:
    """Have MindFormers' Trainer sample by the model's ``top_k``: 0 and null, all tokens, it takes for 1.

    ``config``: MindFormers' whole config, changed in place.
    """
    if config.model.model_config.type == "TelechatConfig":
        config.top_k = _with_defaults(config.model.model_config)["top_k"] or 0


def seed_sampling(config) -> None:
    """Begin the random numbers of sampling at ``config.seed``, the same in all processes; None: anywhere.

    MindFormers' Trainer takes the seed 0 for none.
    """
    if config.seed is not None:
        from mindspore import set_seed

        set_seed(config.seed)


def share_model(config: dict, plan: dict | None) -> None:
    """Have the processes of a ``use_parallel`` prediction share the model, instead of slicing its graph.

    Changes ``config``, the raw YAML with overrides; a single process predicts without ``use_parallel``.
    ``plan``: of ``prediction_plan``.

    Raises:
        UsageError: several processes have no seed, and would sample differently.
    """
    model = config["model"]
    if (model.get("model_config") or {}).get("type") != "TelechatConfig":
        return
    if plan is None:
        config.pop("parallel_config", None)  # which means nothing without use_parallel
        return
    if plan and config.get("seed", 0) is None:
        raise UsageError(
            "seed is null, but the processes that share a model must draw the same random numbers; give "
            "--seed with a number."
        )
    model["arch"] = {"type": PARALLEL_MODEL}
    config["parallel"] = (config.get("parallel") or {}) | {
        "parallel_mode": "STAND_ALONE",
        "full_batch": False,
    }
    config["parallel_config"] = plan
    config["use_parallel"] = bool(plan)


def prepare_prompts(config) -> str | list[str]:
    """Read the prompts of ``config.input_data``, and check that the model can answer each.

    One word may name a UTF-8 text file of a prompt on each line, with ``\\n`` for a newline in it; what
    looks like a file and is none, or holds data for ``--question_file``, is no prompt. Sets the
    model's ``pad_token_id`` to the tokenizer's where it is -1: MindFormers pads with the one and measures
    with the other. Has answers that a limit cuts inside a character end before it.

    Args:
        config: MindFormers' whole config (MindFormerConfig).

    Returns:
        One prompt, or several.

    Raises:
        UsageError: no prompts; one is empty or leaves no room for an answer; or the vocabulary is not the
            model's.
    """
    read = _read(config.input_data)
    prompts = [read] if isinstance(read, str) else read
    settings = _with_defaults(config.model.model_config)
    section = dict(config.processor.tokenizer)
    section.pop("auto_register", None)
    if (kind := section.pop("type", None)) == TOKENIZER:
        from research.telechat2.telechat_tokenizer import TelechatTokenizer

        tokenizer = TelechatTokenizer(**section)
        check_vocabulary(tokenizer, section["vocab_file"], settings)
        config.processor.tokenizer.whole_characters = True
        if settings["pad_token_id"] == -1:
            config.model.model_config.pad_token_id = tokenizer.pad_token_id
    else:
        check_pieces(section.get("vocab_file"), settings)
        print(f"lengths not checked: the tokenizer is a {kind}, no {TOKENIZER}", flush=True)
    limits = GenerationLimits.of(SimpleNamespace(**settings))
    for index, prompt in enumerate(prompts):
        with numbered("prompt", index + 1, len(prompts)):
            prompts[index] = without_byte_order_marks(prompt)
            if is_blank(prompts[index]):
                raise UsageError("it is empty, or blanks only; write it or remove the line.")
            if kind == TOKENIZER:
                limits.check_prompt(len(tokenizer(prompts[index])["input_ids"]))
    return prompts[0] if isinstance(read, str) else prompts


def _read(input_data) -> str | list[str]:
    words = [input_data] if isinstance(input_data, str) else list(input_data)
    for word in words:
        _check_word(word, alone=len(words) == 1)
    if len(words) > 1:
        return words
    if not exists(words[0]):
        return words[0]
    read = read_lines(words[0], is_data=False)
    lines = [line.rstrip("\r\n").replace(r"\n", "\n") for _, line in read]
    if not lines:
        raise UsageError(f"--predict_data {words[0]}: the file is empty; write a prompt on each line.")
    return lines


def _check_word(word: str, alone: bool) -> None:
    """Refuse a word of --predict_data that is meant as a file, and could only be asked as text."""
    named = f"--predict_data {word}"
    if alone and exists(word) and (Path(word).is_dir() or DATA_FILE.search(word) or holds_data(word)):
        raise UsageError(
            f"{named} is data in JSON or a folder, but a text file with a prompt on each line is asked as it "
            f"is: run_telechat_predict.py --question_file {word} asks its conversations."
        )
    if not _FILE_NAME.fullmatch(word) or (alone and exists(word)):
        return
    if exists(word):
        raise UsageError(f"{named} is a file beside other prompts; give one file alone, or prompts alone.")
    raise UsageError(f"{named} names a file that does not exist; give its path, or a prompt.")


def _with_defaults(model_config) -> dict:
    """The settings of ``model_config``, and the default of each that it does not state."""
    return defaults_of(ModelSettings) | dict(model_config)
