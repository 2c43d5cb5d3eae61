"""The two conversions, torch -> MindSpore and back, and reading a MindSpore checkpoint tensor by tensor."""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.telechat2.checkpoint.job.job import Job, Options, Written, check_choice
from research.telechat2.checkpoint.job.output import deal
from research.telechat2.checkpoint.job.run import run_job
from research.telechat2.checkpoint.layouts.read import plan_mindspore, plan_torch
from research.telechat2.checkpoint.llama.convert import export_llama, holds_llama, import_llama
from research.telechat2.checkpoint.plan import make_plan
from research.telechat2.checkpoint.release.companion_files import notes_of, small_files, telechat_files
from research.telechat2.checkpoint.sizes import sizes_beside
from research.telechat2.checkpoint.storage.dtypes import widen
from research.telechat2.checkpoint.storage.recognise import refuse_mindspore, refuse_torch
from research.telechat2.checkpoint.table import Side
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError

CKPT_FORMATS = ("safetensors", "ckpt")
TORCH_FORMATS = ("telechat", "llama")
JOINED_FOR = "tensor-parallel size that joined rows are stored for, if nothing beside them records it"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags whose values are the fields of ``Options``."""
    parser.add_argument("--joined_for", type=int, metavar="N", help=JOINED_FOR)
    parser.add_argument("--dtype", choices=tuple(WIDTH), help="of the new weights (default: as they are)")
    parser.add_argument(
        "--max_shard_size", type=parse_size, metavar="SIZE", help="of a file in a folder (default: 5GB)"
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


def options_of(args: argparse.Namespace) -> dict[str, Any]:
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


def convert_to_mindspore(
    torch_path: str | Path, mindspore_path: str | Path, ckpt_format: str | None = None, **options: Any
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
        return import_llama(source, target, Options(**options), ckpt_format == "ckpt")
    return _convert(
        source, target, "torch", Options(**options), (".safetensors", ".ckpt"), ckpt_format == "ckpt"
    )


def convert_to_torch(
    mindspore_path: str | Path,
    torch_path: str | Path,
    torch_format: str | None = None,
    config: str | Path | None = None,
    vocab_file: str | Path | None = None,
    **options: Any,
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
        own_config, vocabulary = (
            path and given_path(path, "the path given") for path in (config, vocab_file)
        )
        return export_llama(source, target, Options(**options), own_config or None, vocabulary or None)
    if was_llama:
        raise UsageError(
            f"the config.json of {source} is that of a Llama model, which the torch code of TeleChat does "
            "not read; use format llama"
        )
    if config or vocab_file:
        raise UsageError("a config or a vocabulary is only taken for format llama; drop them, or use it")
    return _convert(source, target, "mindspore", Options(**options), (".safetensors", ".bin"))


def read_mindspore_tensors(path: str | Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the weights of a MindSpore checkpoint: (name, array), one in memory at a time.

    ``path`` as in ``convert_to_torch``. float32 and float16 come as they are, bfloat16 as float32 (exact):
    NumPy has no bfloat16. Optimizer states and the like are left out.

    Raises:
        UsageError: the checkpoint is broken or incomplete, or not a TeleChat model.
    """
    source = given_path(path, "path")
    for tensor in plan_mindspore(source, sizes_beside(source)).sources:
        data = tensor.read()
        array = widen(data, "bfloat16") if tensor.dtype == "bfloat16" else np.frombuffer(data, tensor.dtype)
        yield tensor.name, array.reshape(tensor.shape)


def _convert(
    source: Path,
    target: Path,
    side: Side,
    options: Options,
    file_suffixes: Sequence[str],
    as_ckpt: bool = False,
) -> Written:
    """From the names of ``side`` to those of the other one."""
    sizes, from_torch = sizes_beside(source), side == "torch"
    plan = plan_torch(source, sizes) if from_torch else plan_mindspore(source, sizes)
    folder, files = deal(target, plan.weights, options, source, file_suffixes, as_ckpt)
    other: Side = "mindspore" if from_torch else "torch"
    along, along_notes = telechat_files(source, plan.sizes, side) if folder == target else ({}, ())
    job = Job(
        source=source,
        sources=plan.named_sources,
        files=files,
        back=lambda tensors: make_plan(tensors, other, plan.sizes, f"what was written to {folder}").weights,
        framework="ms" if from_torch else "pt",
        beside=small_files(source, target, folder) | along,
        notes=(*notes_of(plan, source, target, folder), *along_notes),
        ignored=plan.ignored,
    )
    return run_job(job, folder, options)


def given_path(path: str | Path, what: str) -> Path:
    """A path; UsageError if it is empty, as an unset variable of a shell makes it."""
    if not str(path).strip():
        raise UsageError(f"{what} is empty; expected the path of a file or a folder")
    return Path(path)
