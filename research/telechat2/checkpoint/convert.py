"""The two conversions, torch -> MindSpore and back, and reading a MindSpore checkpoint tensor by tensor."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.telechat2 import telechat_prompt_format
from research.telechat2.checkpoint.dtypes import WIDTH, widen
from research.telechat2.checkpoint.job import Job, Options, Written, run_job
from research.telechat2.checkpoint.output import deal
from research.telechat2.checkpoint.plan import Plan, make_plan
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.sources import read_mindspore_source, read_torch_source
from research.telechat2.checkpoint.table import Side, canonical_name

CONFIG = "config.json"
CKPT_FORMATS = ("safetensors", "ckpt")


@dataclass(frozen=True)
class Summary(Written):
    """What a conversion did; ``ignored`` counts, by kind, source tensors that are not weights."""

    sizes: TelechatSizes
    ignored: dict[str, int]
    prompt_format: str | None


def convert_to_mindspore(
    torch_path: str | Path, mindspore_path: str | Path, ckpt_format: str | None = None, **options
) -> Summary:
    """Convert an HF folder of a TeleChat model to a MindSpore checkpoint.

    ``mindspore_path`` is a file when it ends in ``.safetensors`` or ``.ckpt``, else a folder that receives
    ``model.safetensors`` or shards with an index (``model.ckpt`` with ``ckpt_format="ckpt"``). ``options``
    are the fields of ``Options``. Sizes are those of ``config.json``, where there is one; it is copied into a
    folder, so that the way back checks them too.

    Raises:
        ValueError: a source that is broken or not such a model, a target that exists, or as ``run_job``.
    """
    source, target = _path(torch_path, "torch_path"), _path(mindspore_path, "mindspore_path")
    _check_choice("ckpt_format", ckpt_format, CKPT_FORMATS)
    if target.suffix in (".safetensors", ".ckpt") and ckpt_format not in (None, target.suffix[1:]):
        raise ValueError(
            f"{target} ends in {target.suffix}, but format {ckpt_format} is asked for; drop one of the two"
        )
    return _convert(source, target, "torch", _options(options), (".safetensors", ".ckpt"), ckpt_format)


def convert_to_torch(mindspore_path: str | Path, torch_path: str | Path, **options) -> Summary:
    """Convert a MindSpore checkpoint of a TeleChat model to Hugging Face's names.

    ``mindspore_path`` is a ``.safetensors`` or ``.ckpt`` file or a folder, such as what MindFormers' training
    leaves. ``torch_path`` is a file when it ends in ``.bin`` or ``.safetensors``, else a folder. The rest is
    as in ``convert_to_mindspore``.

    Raises:
        ValueError: as ``convert_to_mindspore``.
    """
    source, target = _path(mindspore_path, "mindspore_path"), _path(torch_path, "torch_path")
    return _convert(source, target, "mindspore", _options(options), (".safetensors", ".bin"))


def read_mindspore_tensors(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weights of a MindSpore checkpoint: (name, array), one in memory at a time.

    ``path`` as in ``convert_to_torch``. float32 and float16 come as they are, bfloat16 as float32 (exact):
    NumPy has no bfloat16. Optimizer states and the like are left out.

    Raises:
        ValueError: the checkpoint is broken or incomplete, or not a TeleChat model.
    """
    source = _path(path, "path")
    plan = make_plan(read_mindspore_source(source), "mindspore", None, str(source))
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
    read, other = (read_torch_source, "mindspore") if side == "torch" else (read_mindspore_source, "torch")
    plan = make_plan(read(source), side, _configured_sizes(source), str(source))
    folder, files = deal(target, plan.weights, options, source, file_suffixes, ckpt_format == "ckpt")
    prompt_format = telechat_prompt_format.find(source)
    job = Job(
        source=source,
        sources={canonical_name(tensor.name, side): tensor for tensor in plan.sources},
        files=files,
        back=lambda tensors: make_plan(tensors, other, plan.sizes, f"what was written to {folder}").weights,
        framework="ms" if side == "torch" else "pt",
        beside=_small_files(source, folder, prompt_format, with_config=folder == target),
        notes=_notes(plan, prompt_format, source, with_config=folder == target),
    )
    done = run_job(job, folder, options)
    return Summary(**vars(done), sizes=plan.sizes, ignored=plan.ignored, prompt_format=prompt_format)


def _small_files(
    source: Path, folder: Path, prompt_format: str | None, with_config: bool
) -> dict[str, bytes]:
    """What goes along with the weights: the config, and which prompts they were tuned with."""
    beside = {}
    if with_config and _config_file(source).is_file():
        beside[CONFIG] = _config_file(source).read_bytes()
    if prompt_format is not None:
        if (folder / telechat_prompt_format.FILE_NAME).exists():
            telechat_prompt_format.write(folder, prompt_format)  # refuses another
        else:
            text = json.dumps({"prompt_format": prompt_format}, indent=2) + "\n"
            beside[telechat_prompt_format.FILE_NAME] = text.encode()
    return beside


def _notes(plan: Plan, prompt_format: str | None, source: Path, with_config: bool) -> tuple[str, ...]:
    tied = ", output layer tied to the embeddings" if plan.sizes.tie_word_embeddings else ""
    lines = [
        f"model: {plan.sizes.describe()}{tied}",
        f"left out: {', '.join(f'{count} {kind}' for kind, count in plan.ignored.items()) or 'nothing'}",
    ]
    if with_config and _config_file(source).is_file():
        lines.append(f"{CONFIG} goes along with the weights")
    if prompt_format:
        lines.append(f"prompt format recorded with the weights: {prompt_format}")
    return tuple(lines)


def _options(given: dict) -> Options:
    options = Options(**given)
    _check_choice("dtype", options.dtype, WIDTH)
    if options.max_shard_size is not None and options.max_shard_size <= 0:
        raise ValueError(f"max_shard_size is {options.max_shard_size}; expected a positive number of bytes")
    return options


def _config_file(source: Path) -> Path:
    return (source if source.is_dir() else source.parent) / CONFIG


def _check_choice(what: str, value: str | None, choices: Iterable[str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{what} {value!r} is unknown; expected one of {', '.join(choices)}")


def _path(path: str | Path, what: str) -> Path:
    if not str(path).strip():
        raise ValueError(f"{what} is empty; expected the path of a file or a folder")
    return Path(path)


def _configured_sizes(source: Path) -> TelechatSizes | None:
    file = _config_file(source)
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a JSON {type(config).__name__}, expected an object")
    try:
        return TelechatSizes.from_hf_config(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
