"""Which files ``--load_checkpoint`` means, and the shape in which MindFormers 1.9 can load them.

Hugging Face folders, weights arranged for parallel inference, and all weights for parallel runs on CPUs are
read by our own reader instead.

MindFormers has two loaders. The one behind the YAML section ``checkpoint:`` resumes on one device, and loads
directories of safetensors only; the older one loads files too, but takes any file in a folder ``rank_*`` for
one slice of many. Where a loader is too narrow for what the user gave, the files meant are linked into
``<output_dir>/load_checkpoint/…`` and that folder is loaded; only .ckpt
weights for the section's loader have to be written anew, as safetensors.
"""

import hashlib
import os
import re
from pathlib import Path

from research.telechat2.checkpoint.layouts.read import is_for_inference, whole_weights
from research.telechat2.checkpoint.layouts.tensor_parallel import is_joined
from research.telechat2.checkpoint.plan import make_plan
from research.telechat2.checkpoint.sizes import SPELLINGS, TelechatSizes
from research.telechat2.checkpoint.storage.folders import (
    latest_iteration,
    rank_folders,
    read_mindspore_source,
)
from research.telechat2.checkpoint.storage.recognise import is_torch_source
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write
from research.telechat2.config.model import feed_forward_width
from research.telechat2.config.sections import section_of
from research.telechat2.run.checkpoint_kind import checkpoint_kind
from research.telechat2.run.processes import is_first_process
from research.telechat2.run.resuming import COMMON, read_iteration, whole_iterations

PARALLEL_MODEL = "ParallelTelechatForCausalLM"  # reads its rank's part of any checkpoint itself
MERGING = "(README, 分布式训练/微调权重合并)"


def prepare_checkpoint(config: dict, *, training: bool) -> Path | None:
    """Point ``config`` at what is to be loaded, in place, and print what that is.

    Sets ``load_checkpoint``, ``load_ckpt_format``, ``resume_training`` and, where the config has the section,
    ``checkpoint.load_path`` and ``checkpoint.no_load_optim``. Nothing given: nothing changes, and the
    output says that the weights are random.

    Args:
        config: the settings, template not needed.
        training: a train or finetune run, the only ones that read the ``checkpoint:`` section.

    Returns:
        What ``run/weights.py`` is to load; None where MindFormers' loaders do.

    Raises:
        UsageError: the path does not exist, holds no checkpoint, or cannot be loaded in this way.
    """
    section = config.get("checkpoint") or None
    given = config.get("load_checkpoint") or (section or {}).get("load_path")
    resume = config.get("resume_training") or False
    if not given:
        _no_checkpoint(config, resume)
        return None
    path = Path(given).expanduser().absolute()
    on_cpus = _is_parallel(config) and (config.get("context") or {}).get("device_target") == "CPU"
    if on_cpus and resume:
        raise UsageError(
            "a parallel run on CPUs cannot be resumed: MindFormers 1.9 synchronises ranks with the operator "
            "Barrier, which has no CPU kernel. Use one device (--use_parallel False), or leave out "
            "--resume_training to start from the weights."
        )
    arch = ((config.get("model") or {}).get("arch") or {}).get("type")
    if on_cpus or arch == PARALLEL_MODEL or is_torch_source(path) or is_for_inference(path):
        _prepare_own(config, path, resume)
        return path
    sectioned = training and section is not None
    if resume and not sectioned and path.is_file():
        path, resume = _folder_and_name(path)
    source, kind = _source(path, _is_parallel(config))
    resume = resume or (sectioned and kind == "iteration" and section.get("no_load_optim") is False)
    _check_resume(path, kind, resume, sectioned, _is_parallel(config))
    if resume and kind == "iteration" and is_first_process():
        read_iteration(source)  # weights, optimizer and step: each is there and whole
    if check_weights(config, source, kind):
        _prepare_own(config, path, resume)
        return path
    loaded = (source if sectioned else path) if resume else _loadable(config, source, kind, sectioned)
    config["load_checkpoint"] = str(loaded)
    config["load_ckpt_format"] = "ckpt" if _is_ckpt(loaded) else "safetensors"
    config["resume_training"] = resume
    if section is not None:
        section["load_path"] = str(loaded)
        section["no_load_optim"] = not resume
    what = "weights, optimizer and step" if resume and kind == "iteration" else "weights"
    what = "to be resumed" if resume and kind != "iteration" else what
    print(f"load_checkpoint: {source} ({what}; format {config['load_ckpt_format']})", flush=True)
    return None


def _prepare_own(config: dict, path: Path, resume: bool | str) -> None:
    """Settings for weights that our own reader loads: MindFormers is only told that there are some."""
    if resume:
        raise UsageError(
            f"cannot resume from {path}: it holds weights, but no optimizer state and step. Leave out "
            "--resume_training to start from these weights."
        )
    if reason := _no_sizes(config):
        print(f"load_checkpoint: not compared with the model yet: {reason}", flush=True)
    else:
        sizes = _sizes_in(config)
        make_plan(list(whole_weights(path, sizes)[1].values()), "mindspore", sizes, str(path))
    folder = str(path if path.is_dir() else path.parent)
    config["load_checkpoint"], config["load_ckpt_format"] = folder, "safetensors"
    config["resume_training"] = False
    if config.get("checkpoint"):
        config["checkpoint"] |= {"load_path": folder, "no_load_optim": True}
    arch = ((config.get("model") or {}).get("arch") or {}).get("type")
    if arch != PARALLEL_MODEL and _has_joined_rows(path):
        print(
            f"load_checkpoint: the rows of {path} are joined (qkv_concat), as {PARALLEL_MODEL} with "
            f"qkv_concat: True has them; they are parted for {arch}",
            flush=True,
        )
    print(f"load_checkpoint: {path} (weights, read where they are, without a conversion)", flush=True)


def _has_joined_rows(path: Path) -> bool:
    if is_torch_source(path):
        return False
    folder = next(iter(rank_folders(path).values()), path)
    return is_joined(tensor.name for tensor in read_mindspore_source(folder))


def _source(path: Path, parallel: bool) -> tuple[Path, str]:
    """The file or folder that ``path`` stands for, and its kind: the latest iteration, the newest file of
    a run's only rank, or ``path`` itself."""
    kind = checkpoint_kind(path)
    if kind == "iteration":
        return _latest(path), kind
    if parallel:
        return path, kind
    if kind == "ranks":
        path, kind = path / "rank_0", f"{_only_rank(path)} folder"
    if kind.endswith("folder") and path.name.startswith("rank_"):
        return newest_file(path, kind.split()[0]), kind.split()[0]
    return path, kind


def _latest(path: Path) -> Path:
    """The iteration that a ``checkpoint`` folder's tracker names, or ``path`` itself."""
    try:
        return latest_iteration(path)
    except UsageError as error:
        whole = whole_iterations(path)
        hint = f": --load_checkpoint {whole[0]} is whole" if whole else ""
        raise UsageError(f"{error}{hint}") from error


def check_weights(config: dict, source: Path, kind: str) -> bool:
    """Compare the tensors of a TeleChat checkpoint with the model before either is loaded.

    MindFormers only logs what it does not find and leaves those parameters random. What cannot be compared
    is said: slices of a parallel run, and models whose YAML does not give all sizes.

    Returns:
        Whether rows are joined (qkv_concat), so that our own reader has to part them.

    Raises:
        UsageError: tensors that are missing, unknown or of another shape, or a torch checkpoint.
    """
    if reason := _not_comparable(config, kind):
        print(f"load_checkpoint: not compared with the model: {reason}", flush=True)
        return False
    files = _model_files(source) if kind == "iteration" else [source]
    tensors = [tensor for file in files for tensor in read_mindspore_source(file)]
    if is_joined(tensor.name for tensor in tensors):
        return True
    make_plan(tensors, "mindspore", _sizes_in(config), str(source))
    return False


def _sizes_in(config: dict) -> TelechatSizes:
    """The sizes of the model that the settings describe."""
    model_config = {"tie_word_embeddings": False} | config["model"]["model_config"]
    model_config["expert_num"] = section_of(config, "moe_config").get("expert_num", 1)  # 1 is a dense model
    if not model_config.get("intermediate_size"):
        model_config["intermediate_size"] = feed_forward_width(
            model_config["hidden_size"],
            model_config.get("ffn_dim_multiplier"),
            model_config.get("multiple_of", 256),  # TelechatConfig's default
        )
    return TelechatSizes.from_hf_config(model_config)


def known_sizes(config: dict) -> TelechatSizes | None:
    """The sizes of the model that the settings describe; None where they do not tell them."""
    return None if _no_sizes(config) else _sizes_in(config)


def _not_comparable(config: dict, kind: str) -> str | None:
    """Why a checkpoint of this kind cannot be held against the model; None if it can."""
    if reason := _no_sizes(config):
        return reason
    if kind == "ranks" or (kind == "iteration" and _is_parallel(config)):
        return "it may hold slices of several ranks"
    if kind.startswith("ckpt") and _is_parallel(config):
        return "every rank would have to read the .ckpt file whole"
    return None


def _no_sizes(config: dict) -> str | None:
    """Why the settings do not tell the model's sizes; None if they do."""
    model_config = (config.get("model") or {}).get("model_config") or {}
    if model_config.get("type") != "TelechatConfig":
        return f"model_config is of type {model_config.get('type')}"
    needed = ("num_layers", "hidden_size", "num_heads", "vocab_size")
    if missing := [name for name in needed if not any(model_config.get(key) for key in SPELLINGS[name])]:
        return f"the YAML states no {', '.join(missing)}"
    return None


def _no_checkpoint(config: dict, resume: bool | str) -> None:
    if resume:
        raise UsageError(
            "resume_training is set, but there is nothing to resume from: give --load_checkpoint the "
            "`checkpoint` folder of the run that is to be continued."
        )
    print("load_checkpoint: none given, the weights are random", flush=True)


def _folder_and_name(file: Path) -> tuple[Path, str]:
    """The folder of the ``rank_*`` folders and the name in them, by which MindFormers resumes from a file."""
    if not file.parent.name.startswith("rank_"):
        raise UsageError(
            f"cannot resume from {file}: MindFormers resumes from a file in a folder rank_0, beside "
            "those of other ranks; make one and put the file there, or leave out --resume_training."
        )
    return file.parent.parent, file.name


def _check_resume(path: Path, kind: str, resume: bool | str, sectioned: bool, parallel: bool) -> None:
    """Refuse what MindFormers 1.9 cannot resume, before it fails half way."""
    if not resume:
        return
    if sectioned and isinstance(resume, str):
        raise UsageError(
            f"resume_training is {resume!r}, but this config has the section `checkpoint:`, which resumes "
            f"from the folder of --load_checkpoint: give --resume_training True, and the `checkpoint` folder "
            f"or one of its iteration_* folders as --load_checkpoint."
        )
    if sectioned and kind != "iteration":
        lacks = (
            f"{COMMON}, which holds the step"
            if path.name.startswith("iteration_")
            else "optimizer state and step"
        )
        raise UsageError(
            f"cannot resume from {path}: it holds weights, but no {lacks}. Resume from the "
            f"`checkpoint` folder of a run that was trained with the section `checkpoint:`, or leave out "
            f"--resume_training to start from these weights."
        )
    if not sectioned and not parallel and not _is_ckpt(path):
        raise UsageError(
            f"cannot resume from {path} on one device: this config has no section `checkpoint:`, and "
            f"without it MindFormers resumes .ckpt files only. Add the section `checkpoint:` to the YAML."
        )


def _loadable(config: dict, source: Path, kind: str, sectioned: bool) -> Path:
    """The path to hand to the loader in charge, for weights alone."""
    if sectioned and kind == "iteration":
        return source
    if sectioned and kind.startswith("ckpt"):
        return _ckpt_as_safetensors(config, source, kind)
    if kind == "iteration":
        return _stage(config, source, _model_files(source))
    if kind == "safetensors" and (
        sectioned or _is_parallel(config) or source.parent.name.startswith("rank_")
    ):
        return _stage(config, source, [source])
    if kind == "safetensors folder" and sectioned:
        return _stage(config, source, sorted(source.glob("*.safetensors")))
    return source


def _only_rank(path: Path) -> str:
    """The suffix of the files in ``path/rank_0``, which must be the only rank."""
    ranks = sorted(folder.name for folder in path.glob("rank_*/"))
    if ranks != ["rank_0"]:
        raise UsageError(
            f"{path} holds slices of {len(ranks)} ranks ({', '.join(ranks[:8])}): load them with "
            f"--use_parallel True and --auto_trans_ckpt True, or merge them first {MERGING}."
        )
    return "safetensors" if any((path / "rank_0").glob("*.safetensors")) else "ckpt"


def newest_file(folder: Path, suffix: str) -> Path:
    """The file of the highest epoch and step in a ``rank_*`` folder: ``prefix_rank_0-<epoch>_<step>.…``."""
    steps = {}
    for path in folder.glob(f"*.{suffix}"):
        numbers = re.search(r"-(\d+)_(\d+)$", path.stem)
        if numbers:
            steps[int(numbers[1]), int(numbers[2])] = path
    if not steps:
        raise UsageError(
            f"{folder} holds no file named <prefix>-<epoch>_<step>.{suffix}; give the file itself."
        )
    return steps[max(steps)]


def _model_files(path: Path) -> list[Path]:
    """The weights of an ``iteration_*`` folder, without the optimizer's states."""
    files = [
        file for file in sorted(path.glob("*.safetensors")) if re.search(r"(^|-)model-\d+-\d+$", file.stem)
    ]
    if len(files) != 1:
        raise UsageError(
            f"{path} holds the weights in {len(files)} files, one for each rank that saved; predicting and "
            f"evaluating load one file. Merge them first {MERGING}."
        )
    return files


def _stage(config: dict, source: Path, files: list[Path]) -> Path:
    """Link ``files`` into a folder of their own below the output directory.

    ``model.safetensors`` gets another name: the ``checkpoint:`` loader takes a folder that holds one, or an
    index of shards, for a Hugging Face model.
    """
    key = hashlib.sha256("\n".join(map(str, [source, *files])).encode()).hexdigest()[:8]
    folder = (
        Path(config.get("output_dir") or "./output").absolute() / "load_checkpoint" / f"{source.stem}-{key}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        name = "weights.safetensors" if path.name == "model.safetensors" else path.name
        _link(folder / name, path.resolve())
    return folder


def _link(link: Path, target: Path) -> None:
    """Make or replace a symbolic link; several ranks may do so at once."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _ckpt_as_safetensors(config: dict, path: Path, kind: str) -> Path:
    """Write .ckpt weights as safetensors, which is all the ``checkpoint:`` loader reads; one device only."""
    if _is_parallel(config):
        raise UsageError(
            f"{path} is in .ckpt format, and a parallel run whose config has the section `checkpoint:` loads "
            f"safetensors only. Convert it once (in research/telechat2: convert_reversed.py --mindspore_path "
            f"{path} --torch_path TORCH_DIR, then convert_weight.py --torch_path TORCH_DIR --mindspore_path "
            f"NEW_DIR), or remove the section `checkpoint:` from the YAML."
        )
    files = [path] if kind == "ckpt" else sorted(path.glob("*.ckpt"))
    folder = _stage(config, path, [])
    print(f"load_checkpoint: writing {path} as safetensors into {folder}", flush=True)
    import mindspore as ms

    for file in files:
        with atomic_write(folder / f"{file.stem}.safetensors") as temporary:
            ms.save_checkpoint(ms.load_checkpoint(str(file)), str(temporary), format="safetensors")
    return folder


def _is_parallel(config: dict) -> bool:
    return bool(config.get("use_parallel"))


def _is_ckpt(path: Path) -> bool:
    return path.suffix == ".ckpt" or any(path.glob("*.ckpt")) or any(path.glob("rank_*/*.ckpt"))
