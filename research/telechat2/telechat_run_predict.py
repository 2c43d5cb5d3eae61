"""What run_mindformer.py looks at before MindFormers predicts: vocabulary, and length of the prompts."""

import inspect
import re
from pathlib import Path

from research.telechat2.data.formats import holds_data, read_text_lines
from research.telechat2.data.same_vocabulary import check_pieces
from research.telechat2.data.sources import DATA_FILE
from research.telechat2.telechat_predict_plan import PARALLEL_MODEL, prediction_plan, processes_of_run
from research.telechat2.telechat_predict_utils import check_length, check_vocabulary, length_of_config
from research.telechat2.text.messages import is_blank, without_byte_order_marks

TOKENIZER = "TelechatTokenizer"
_FILE_NAME = re.compile(r"[^\s<>?]+\.(txt|jsonl|ndjson|json)(\.(gz|zst))?", re.IGNORECASE)


def check_vocab_file(config: dict) -> None:
    """Refuse a missing vocabulary before the slow imports; ``config`` is the raw YAML with overrides.

    Raises:
        ValueError: no ``processor.tokenizer.vocab_file``, or there is no such file.
    """
    vocab_file = ((config.get("processor") or {}).get("tokenizer") or {}).get("vocab_file")
    if not vocab_file:
        raise ValueError(
            "the config names no vocab_file; give --processor.tokenizer.vocab_file tokenizer.model."
        )
    if not Path(vocab_file).is_file():
        raise ValueError(f"processor.tokenizer.vocab_file is {vocab_file}, but there is no such file.")


def seed_sampling(config) -> None:
    """Begin the random numbers of sampling at ``config.seed``, the same in all processes; None: anywhere.

    MindFormers' Trainer takes the seed 0 for none.
    """
    if config.seed is not None:
        from mindspore import set_seed

        set_seed(config.seed)


def share_model(config: dict) -> None:
    """Have the processes of a ``use_parallel`` prediction share the model, instead of slicing its graph.

    Changes ``config``, the raw YAML with overrides; a single process predicts without ``use_parallel``.

    Raises:
        ValueError: as ``prediction_plan``; or several processes have no seed, and would sample differently.
    """
    model = config["model"]
    if (model.get("model_config") or {}).get("type") != "TelechatConfig":
        return
    plan = prediction_plan(config, processes_of_run())
    if plan is None:
        config.pop("parallel_config", None)  # which means nothing without use_parallel
        return
    if plan and config.get("seed", 0) is None:
        raise ValueError(
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

    One word may name a UTF-8 text file of a prompt on each line, with ``\\n`` for a newline in it. Sets the
    model's ``pad_token_id`` to the tokenizer's where it is -1: MindFormers pads with the one and measures
    with the other. Has answers that a limit cuts inside a character end before it.

    Args:
        config: MindFormers' whole config (MindFormerConfig).

    Returns:
        One prompt, or several.

    Raises:
        ValueError: a prompt is empty or leaves no room for an answer, or the vocabulary is not the model's.
    """
    prompts = _unmarked(_read(config.input_data))
    section = dict(config.processor.tokenizer)
    if (kind := section.pop("type", None)) != TOKENIZER:
        check_pieces(section.get("vocab_file"), _with_defaults(config.model.model_config))
        print(f"prompts not checked: the tokenizer is a {kind}, no {TOKENIZER}", flush=True)
        return prompts
    section.pop("auto_register", None)
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    tokenizer = TelechatTokenizer(**section)
    settings = _with_defaults(config.model.model_config)
    check_vocabulary(tokenizer, section["vocab_file"], settings)
    config.processor.tokenizer.whole_characters = True
    if settings["pad_token_id"] == -1:
        config.model.model_config.pad_token_id = tokenizer.pad_token_id
    limit = length_of_config(settings["max_decode_length"], settings["seq_length"])
    several = [prompts] if isinstance(prompts, str) else prompts
    for number, prompt in enumerate(several, 1):
        try:
            _check(prompt, tokenizer, *limit)
        except ValueError as error:
            raise ValueError(f"prompt {number} of {len(several)}: {error}") from error
    return prompts


def _read(input_data) -> str | list[str]:
    words = [input_data] if isinstance(input_data, str) else list(input_data)
    if len(words) > 1:
        return words
    try:
        is_file = Path(words[0]).is_file()
    except (OSError, ValueError):  # too long for a name, or a zero byte in it
        is_file = False
    if not is_file:
        if _FILE_NAME.fullmatch(words[0]):
            raise ValueError(
                f"--predict_data {words[0]} names a file that does not exist; give its path, or a prompt."
            )
        return words[0]
    if DATA_FILE.search(words[0]) or holds_data(words[0]):
        raise ValueError(
            f"--predict_data {words[0]} is data in JSON, but a text file with a prompt on each line is asked "
            "as it is: run_telechat_predict.py --question_file asks its conversations."
        )
    return [line.rstrip("\r\n").replace(r"\n", "\n") for _, line in read_text_lines(words[0])]


def _unmarked(prompts: str | list[str]) -> str | list[str]:
    """Prompts without byte order marks around them; ValueError for one inside, with the prompt's number."""
    if isinstance(prompts, str):
        return without_byte_order_marks(prompts)
    found = []
    for number, prompt in enumerate(prompts, 1):
        try:
            found.append(without_byte_order_marks(prompt))
        except ValueError as error:
            raise ValueError(f"prompt {number} of {len(prompts)}: {error}") from error
    return found


def _check(text: str, tokenizer, max_length: int, limited_by: str) -> None:
    if is_blank(text):
        raise ValueError("it is empty, or blanks only; write it or remove the line.")
    check_length(len(tokenizer(text)["input_ids"]), max_length, limited_by)


def _with_defaults(model_config) -> dict:
    """The settings of ``model_config``, and TelechatConfig's default where it has none."""
    from research.telechat2.telechat_config import TelechatConfig

    parameters = inspect.signature(TelechatConfig.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items()} | dict(model_config)
