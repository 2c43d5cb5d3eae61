"""The two conversions, torch -> MindSpore and back, and reading a MindSpore checkpoint tensor by tensor."""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.telechat2.checkpoint.job.output import deal
from research.telechat2.checkpoint.job.run import Job, Options, Written, run_job
from research.telechat2.checkpoint.layouts.read import plan_whole
from research.telechat2.checkpoint.llama.companion_files import GENERATION, telechat_files
from research.telechat2.checkpoint.llama.config_values import json_bytes, read_json
from research.telechat2.checkpoint.llama.convert import export_llama, holds_llama, import_llama
from research.telechat2.checkpoint.llama.description import token_ids
from research.telechat2.checkpoint.plan import Plan, make_plan
from research.telechat2.checkpoint.recognised import refuse_mindspore, refuse_torch
from research.telechat2.checkpoint.sizes import CONFIG, TelechatSizes, config_beside, sizes_beside
from research.telechat2.checkpoint.storage.dtypes import WIDTH, widen
from research.telechat2.checkpoint.storage.folders import read_torch_source
from research.telechat2.checkpoint.table import Side, canonical_name
from research.telechat2.common.errors import UsageError
from research.telechat2.text import prompt_format as prompt_formats

CKPT_FORMATS = ("safetensors", "ckpt")
TORCH_FORMATS = ("telechat", "llama")


JOINED_FOR = "ranks that the rows of the weights are joined for, if nothing beside them records it"


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags whose values are the fields of ``Options``."""
    parser.add_argument("--dtype", choices=tuple(WIDTH), help="of the new weights (default: as they are)")
    parser.add_argument(
        "--max_shard_size",
        type=parse_size,
        metavar="SIZE",
        help="of a file in a folder (default: 5GB)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the table of tensors, source and target; write nothing"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the result back and trace every tensor to its source (default)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue a conversion that was stopped, and keep what is done if this one is",
    )


def options_of(args: argparse.Namespace) -> dict:
    """The fields of ``Options`` that parsed arguments give."""
    return {key: getattr(args, key) for key in ("dtype", "max_shard_size", "dry_run", "verify", "resume")}


def parse_size(text: str) -> int:
    """Bytes: a number, or one with a unit such as ``5GB`` (10^9 bytes each) or ``5GiB`` (2^30).

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected a number of bytes, or such as 5GB")
    return size


@dataclass(frozen=True)
class Summary(Written):
    """What a conversion did; ``ignored`` counts, by kind, source tensors that are not weights."""

    sizes: TelechatSizes
    ignored: dict[str, int]
    prompt_format: str | None


def convert_to_mindspore(
    torch_path: str | Path, mindspore_path: str | Path, ckpt_format: str | None = None, **options
) -> Written:
    """Convert an HF folder of a TeleChat model, or of a Llama, to a MindSpore checkpoint.

    ``mindspore_path`` is a file when it ends in ``.safetensors`` or ``.ckpt``, else a folder that receives
    ``model.safetensors`` or shards with an index (``model.ckpt`` with ``ckpt_format="ckpt"``). ``options``
    are the fields of ``Options``. Sizes are those of ``config.json``, where there is one; it is copied into a
    folder, so that the way back checks them too. It also says whether this is a Llama, which has none but
    such a config: see ``import_llama``.

    Raises:
        UsageError: a source that is broken or not such a model, a target that exists, or as ``run_job``.
    """
    source, target = given_path(torch_path, "torch_path"), given_path(mindspore_path, "mindspore_path")
    check_choice("ckpt_format", ckpt_format, CKPT_FORMATS)
    if target.suffix in (".safetensors", ".ckpt") and ckpt_format not in (None, target.suffix[1:]):
        raise UsageError(
            f"{target} ends in {target.suffix}, but format {ckpt_format} is asked for; drop one of the two"
        )
    refuse_mindspore(source)
    if holds_llama(source):
        return import_llama(source, target, checked_options(options), ckpt_format == "ckpt")
    return _convert(source, target, "torch", checked_options(options), (".safetensors", ".ckpt"), ckpt_format)


def convert_to_torch(
    mindspore_path: str | Path,
    torch_path: str | Path,
    torch_format: str | None = None,
    config: str | Path | None = None,
    vocab_file: str | Path | None = None,
    **options,
) -> Written:
    """Convert a MindSpore checkpoint of a TeleChat model to Hugging Face's names.

    ``mindspore_path`` is a ``.safetensors`` or ``.ckpt`` file or a folder, such as what MindFormers' training
    leaves, of any layout: joined rows are parted, ranks of tensor parallelism glued. ``torch_path`` is a file
    when it ends in ``.bin`` or ``.safetensors``, else a folder. The rest is as in ``convert_to_mindspore``.

    ``torch_format`` is telechat or llama, by default what the weights were converted from; ``config`` and
    ``vocab_file`` as in ``export_llama``, and only there.

    Raises:
        UsageError: as ``convert_to_mindspore``.
    """
    source, target = given_path(mindspore_path, "mindspore_path"), given_path(torch_path, "torch_path")
    refuse_torch(source)
    check_choice("format", torch_format, TORCH_FORMATS)
    was_llama = holds_llama(source)
    if torch_format == "llama" or (torch_format is None and was_llama):
        config, vocab_file = (path and given_path(path, "the path given") for path in (config, vocab_file))
        return export_llama(source, target, checked_options(options), config, vocab_file)
    if was_llama:
        raise UsageError(
            f"the config.json of {source} is that of a Llama model, which the torch code of TeleChat does "
            "not read; use format llama"
        )
    if config or vocab_file:
        raise UsageError("a config or a vocabulary is only taken for format llama; drop them, or use it")
    return _convert(source, target, "mindspore", checked_options(options), (".safetensors", ".bin"))


def read_mindspore_tensors(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weights of a MindSpore checkpoint: (name, array), one in memory at a time.

    ``path`` as in ``convert_to_torch``. float32 and float16 come as they are, bfloat16 as float32 (exact):
    NumPy has no bfloat16. Optimizer states and the like are left out.

    Raises:
        UsageError: the checkpoint is broken or incomplete, or not a TeleChat model.
    """
    source = given_path(path, "path")
    plan = plan_whole(source, sizes_beside(source))
    for tensor in plan.sources:
        data = tensor.read(tensor.dtype)
        array = widen(data, "bfloat16") if tensor.dtype == "bfloat16" else np.frombuffer(data, tensor.dtype)
        yield tensor.name, array.reshape(tensor.shape)


def _convert(
    source: Path,
    target: Path,
    side: Side,
    options: Options,
    file_suffixes: tuple[str, ...],
    ckpt_format: str | None = None,
) -> Summary:
    """From the names of ``side`` to those of the other one."""
    sizes, other = sizes_beside(source), "mindspore" if side == "torch" else "torch"
    if side == "torch":
        plan = make_plan(read_torch_source(source), side, sizes, str(source))
    else:
        plan = plan_whole(source, sizes)
    folder, files = deal(target, plan.weights, options, source, file_suffixes, ckpt_format == "ckpt")
    prompt_format = prompt_formats.find(source)
    along, along_notes = (
        telechat_files(_config_file(source), plan.sizes, side) if folder == target else ({}, ())
    )
    job = Job(
        source=source,
        sources={canonical_name(tensor.name, side): tensor for tensor in plan.sources},
        files=files,
        back=lambda tensors: make_plan(tensors, other, plan.sizes, f"what was written to {folder}").weights,
        framework="ms" if side == "torch" else "pt",
        beside=small_files(source, target, folder, prompt_format) | along,
        notes=(*notes_of(plan, prompt_format, source, config_name(target, folder)), *along_notes),
    )
    done = run_job(job, folder, options)
    return Summary(**vars(done), sizes=plan.sizes, ignored=plan.ignored, prompt_format=prompt_format)


def small_files(source: Path, target: Path, folder: Path, prompt_format: str | None) -> dict[str, bytes]:
    """What goes along with the weights: the config, and which prompts they were tuned with.

    A folder gets ``config.json``; a single file a config of its own, named after it, see config_beside.
    """
    beside = {}
    if (config := config_beside(source)) is not None:
        beside[config_name(target, folder)] = _config_content(config, alone=folder != target)
    if prompt_format is not None:
        record = folder / prompt_formats.FILE_NAME
        content = (json.dumps({"prompt_format": prompt_format}, indent=2) + "\n").encode()
        if record.exists():
            prompt_formats.write(folder, prompt_format)  # refuses another
            content = record.read_bytes()
        beside[record.name] = content
    return beside


def config_name(target: Path, folder: Path) -> str:
    """The name of the config of what is written to ``target``, which is ``folder`` or a file in it."""
    return CONFIG if folder == target else f"{target.name}.{CONFIG}"


def _config_content(config: Path, alone: bool) -> bytes:
    """The bytes of a config.json; ``alone``: with the ids of the generation_config.json that stays behind."""
    generation = read_json(config.parent / GENERATION) if alone else None
    if generation is None:
        return config.read_bytes()
    content = read_json(config)
    ids = {key: value for key, value in token_ids(content, generation).items() if value is not None}
    return config.read_bytes() if ids.items() <= content.items() else json_bytes(content | ids)


def notes_of(plan: Plan, prompt_format: str | None, source: Path, config: str) -> tuple[str, ...]:
    """Lines of a summary: the model, what is left out, and what goes along."""
    tied = ", output layer tied to the embeddings" if plan.sizes.tie_word_embeddings else ""
    lines = [
        f"model: {plan.sizes.describe()}{tied}",
        f"left out: {', '.join(f'{count} {kind}' for kind, count in plan.ignored.items()) or 'nothing'}",
    ]
    if config_beside(source) is not None:
        lines.append(f"config.json goes along with the weights{'' if config == CONFIG else f', as {config}'}")
    if prompt_format:
        lines.append(f"prompt format recorded with the weights: {prompt_format}")
    return tuple(lines)


def checked_options(given: dict) -> Options:
    """The options of these fields; UsageError for a value that is none."""
    options = Options(**given)
    check_choice("dtype", options.dtype, WIDTH)
    if options.max_shard_size is not None and options.max_shard_size <= 0:
        raise UsageError(f"max_shard_size is {options.max_shard_size}; expected a positive number of bytes")
    return options


def _config_file(source: Path) -> Path:
    return config_beside(source) or (source if source.is_dir() else source.parent) / CONFIG


def check_choice(what: str, value: str | None, choices: Iterable[str]) -> None:
    """UsageError if ``value`` is given, but none of ``choices``."""
    if value is not None and value not in choices:
        raise UsageError(f"{what} {value!r} is unknown; expected one of {', '.join(choices)}")


def given_path(path: str | Path, what: str) -> Path:
    """A path; UsageError if it is empty, as an unset variable of a shell makes it."""
    if not str(path).strip():
        raise UsageError(f"{what} is empty; expected the path of a file or a folder")
    return Path(path)
