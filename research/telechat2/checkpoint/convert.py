"""The two conversions, torch -> MindSpore and back, and reading a MindSpore checkpoint tensor by tensor."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.telechat2 import telechat_prompt_format
from research.telechat2.checkpoint.dtypes import WIDTH, widen
from research.telechat2.checkpoint.output import SINGLE_FILE, plan_shards, require_new, write_checkpoint
from research.telechat2.checkpoint.plan import Plan, make_plan
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.sources import read_mindspore_source, read_torch_source

MAX_SHARD_BYTES = 5_000_000_000  # of an HF folder: what transformers itself writes
CONFIG = "config.json"
CKPT_FORMATS = ("safetensors", "ckpt")


@dataclass(frozen=True)
class Summary:
    """What a conversion read and wrote; ``ignored`` counts, by kind, source tensors that are not weights."""

    sources: tuple[Path, ...]
    files: tuple[Path, ...]
    tensors: int
    parameters: int
    bytes: int
    ignored: dict[str, int]
    dtypes: tuple[str, ...]
    sizes: TelechatSizes
    prompt_format: str | None
    config_copied: bool

    def __str__(self) -> str:
        lines = [
            f"read {', '.join(map(str, self.sources[:3]))}"
            + (f" and {len(self.sources) - 3} more files" if len(self.sources) > 3 else ""),
            f"wrote {self.tensors:,} tensors, {self.parameters:,} parameters, {self.bytes:,} bytes, "
            f"{' and '.join(self.dtypes)}, to {self.files[0]}"
            + (f" and {len(self.files) - 1} more files" if len(self.files) > 1 else ""),
            f"model: {self.sizes.describe()}"
            + (", output layer tied to the embeddings" if self.sizes.tie_word_embeddings else ""),
            f"left out: {', '.join(f'{count} {kind}' for kind, count in self.ignored.items()) or 'nothing'}",
        ]
        if self.config_copied:
            lines.append(f"copied {CONFIG} from the source")
        if self.prompt_format:
            lines.append(f"prompt format recorded with the weights: {self.prompt_format}")
        return "\n".join(lines)


def convert_to_mindspore(
    torch_path: str | Path,
    mindspore_path: str | Path,
    dtype: str | None = None,
    ckpt_format: str | None = None,
) -> Summary:
    """Convert an HF folder of a TeleChat model to one MindSpore checkpoint file.

    ``mindspore_path`` is a file when it ends in ``.safetensors`` or ``.ckpt``, else a folder that receives
    ``model.safetensors`` (``model.ckpt`` with ``ckpt_format="ckpt"``). ``dtype`` (float32, float16, bfloat16)
    None keeps each tensor's own. Sizes are those of ``config.json``, where there is one; it is copied into a
    folder, so that the way back checks them too.

    Raises:
        ValueError: a source that is broken or not such a model, or a target that exists.
    """
    source, target = _path(torch_path, "torch_path"), _path(mindspore_path, "mindspore_path")
    _check_choice("dtype", dtype, WIDTH)
    _check_choice("ckpt_format", ckpt_format, CKPT_FORMATS)
    wanted = f".{ckpt_format}" if ckpt_format else None
    is_folder = target.suffix not in (".safetensors", ".ckpt")
    if not is_folder and wanted not in (None, target.suffix):
        raise ValueError(
            f"{target} ends in {target.suffix}, but format {ckpt_format} is asked for; drop one of the two"
        )
    require_new(target, is_folder, source)
    if is_folder:
        target = target / Path(SINGLE_FILE).with_suffix(wanted or ".safetensors")
    plan = make_plan(read_torch_source(source), "torch", _configured_sizes(source), str(source))
    return _write({target: plan.weights}, plan, dtype, "ms", source, is_folder)


def convert_to_torch(mindspore_path: str | Path, torch_path: str | Path, dtype: str | None = None) -> Summary:
    """Convert a MindSpore checkpoint of a TeleChat model to Hugging Face's names.

    ``mindspore_path`` is a ``.safetensors`` or ``.ckpt`` file or a folder, such as what MindFormers' training
    leaves. ``torch_path`` is a file when it ends in ``.bin`` or ``.safetensors``, else a folder that receives
    ``model.safetensors``, or shards of at most 5 GB and an index. ``dtype`` and
    ``config.json`` as in ``convert_to_mindspore``.

    Raises:
        ValueError: a source that is broken or not such a model, or a target that exists.
    """
    source, target = _path(mindspore_path, "mindspore_path"), _path(torch_path, "torch_path")
    _check_choice("dtype", dtype, WIDTH)
    is_folder = target.suffix not in (".safetensors", ".bin")
    require_new(target, is_folder, source)
    plan = make_plan(read_mindspore_source(source), "mindspore", _configured_sizes(source), str(source))
    files = {target: plan.weights}
    if is_folder:
        files = plan_shards(target, plan.weights, dtype, MAX_SHARD_BYTES)
    return _write(files, plan, dtype, "pt", source, is_folder)


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


def _write(
    files: dict, plan: Plan, dtype: str | None, framework: str, source: Path, is_folder: bool
) -> Summary:
    prompt_format = telechat_prompt_format.find(source)
    folder = next(iter(files)).parent

    beside = _config_to_copy(source, folder) if is_folder else {}

    def record_prompt_format(where: Path) -> None:
        if prompt_format is not None:
            telechat_prompt_format.write(where, prompt_format)

    if (folder / telechat_prompt_format.FILE_NAME).exists():
        record_prompt_format(folder)  # another format there is an error, better known before the work
    write_checkpoint(files, dtype, framework, record_prompt_format, beside)
    tensors = [tensor for tensor, _ in plan.weights]
    return Summary(
        sources=tuple(dict.fromkeys(tensor.file for tensor in plan.sources)),
        files=tuple(files),
        tensors=len(tensors),
        parameters=sum(tensor.size for tensor in tensors),
        bytes=sum(tensor.nbytes(dtype) for tensor in tensors),
        ignored=plan.ignored,
        dtypes=tuple(sorted({dtype or tensor.dtype for tensor in tensors})),
        sizes=plan.sizes,
        prompt_format=prompt_format,
        config_copied=bool(beside),
    )


def _config_to_copy(source: Path, folder: Path) -> dict[Path, bytes]:
    """The config.json to write and its content: none where the source has none, or the folder has the same.

    Raises:
        ValueError: the folder has another.
    """
    file, target = _config_file(source), folder / CONFIG
    if not file.is_file():
        return {}
    content = file.read_bytes()
    if not target.exists():
        return {target: content}
    if target.read_bytes() != content:
        raise ValueError(
            f"{target} differs from {file}, which belongs to the weights; nothing is overwritten: give "
            "another folder, or delete it"
        )
    return {}


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
