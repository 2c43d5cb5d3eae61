"""Which files ``--load_checkpoint`` means, and who loads them.

Our own reader loads the weights of a TeleChat2 model from any layout: every process reads its part where it
lies. MindFormers 1.9 resumes, re-shards what several ranks of a cluster have saved, and loads models of a
user's own. It has two loaders: the one behind the YAML section ``checkpoint:`` resumes on one device, and
loads directories of safetensors only; the older one loads files too.
"""

import re
from pathlib import Path

from research.telechat2.checkpoint.layouts.read import is_for_inference, whole_weights
from research.telechat2.checkpoint.plan import make_plan
from research.telechat2.checkpoint.sizes import SPELLINGS, TelechatSizes
from research.telechat2.checkpoint.storage.folders import TRACKER, latest_iteration
from research.telechat2.checkpoint.storage.recognise import is_torch_source
from research.telechat2.common.errors import UsageError
from research.telechat2.config.model import feed_forward_width
from research.telechat2.config.sections import section_of
from research.telechat2.run.processes import is_first_process, on_cpu
from research.telechat2.run.resuming import COMMON, read_iteration, whole_iterations

PARALLEL_MODEL = "ParallelTelechatForCausalLM"  # reads its rank's part of any checkpoint itself
SUFFIXES = (".safetensors", ".ckpt")
MERGING = "(README, 分布式训练/微调权重合并)"


def prepare_checkpoint(config: dict, *, training: bool) -> Path | None:
    """Point ``config`` at what is to be loaded, in place, and print what that is.

    Sets ``load_checkpoint``, ``load_ckpt_format``, ``resume_training`` and, where the config has the section,
    ``checkpoint.load_path`` and ``checkpoint.no_load_optim``.

    Args:
        config: the settings.
        training: a train or finetune run, the only ones that read the ``checkpoint:`` section.

    Returns:
        What our own reader loads; None where MindFormers' loaders do.

    Raises:
        UsageError: the path does not exist, holds no checkpoint, is not the model's, or cannot be loaded so.
    """
    section = config.get("checkpoint") or None
    given = config.get("load_checkpoint") or (section or {}).get("load_path")
    resume = config.get("resume_training") or False
    if not given:
        if resume:
            raise UsageError(
                "resume_training is set, but there is nothing to resume from; give --load_checkpoint the "
                "`checkpoint` folder of the run that is to be continued."
            )
        print("load_checkpoint: none given, the weights are random", flush=True)
        return None
    path, parallel = Path(given).expanduser().absolute(), bool(config.get("use_parallel"))
    on_cpus = parallel and on_cpu(config)
    if on_cpus and resume:  # MindFormers 1.9 calls the operator Barrier, which has no CPU kernel
        raise UsageError(
            "a parallel run on CPUs cannot be resumed; use one device (--use_parallel False), or leave out "
            "--resume_training to start from the weights."
        )
    arch = section_of(config, "model.arch").get("type")
    if on_cpus or arch == PARALLEL_MODEL or is_torch_source(path) or is_for_inference(path):
        return _load_ourselves(config, path, resume)
    sectioned = training and section is not None
    if resume and not sectioned and path.is_file():
        path, resume = _folder_and_name(path)
    source, kind = _source(path, parallel)
    resume = resume or (sectioned and kind == "iteration" and section.get("no_load_optim") is False)
    _check_resume(path, kind, resume, sectioned, parallel)
    sliced = kind == "ranks" or (kind == "iteration" and len(model_files(source)) > 1)
    ours = section_of(config, "model.model_config").get("type") == "TelechatConfig"
    if ours and not resume and not sliced:
        return _load_ourselves(config, source, resume)
    if kind == "iteration" and resume and is_first_process():
        read_iteration(source)  # weights, optimizer and step: each is there and whole
    if kind == "iteration" and sliced and not sectioned:
        raise UsageError(
            f"{source} holds the weights in {len(model_files(source))} files; to predict or evaluate, merge "
            f"them first {MERGING}."
        )
    if sliced:
        print("load_checkpoint: not compared with the model: it may hold slices of several ranks", flush=True)
    else:
        _compare(config, model_files(source)[0] if kind == "iteration" else source)
    loaded = path if resume and not sectioned else source
    _hand_over(config, loaded, "ckpt" if _is_ckpt(loaded) else "safetensors", resume)
    resumed = "weights, optimizer and step" if kind == "iteration" else "to be resumed"
    what = resumed if resume else "weights"
    print(f"load_checkpoint: {source} ({what}; format {config['load_ckpt_format']})", flush=True)
    return None


def _load_ourselves(config: dict, path: Path, resume: bool | str) -> Path:
    """Compare weights with the model, and tell MindFormers only that there are some."""
    if resume:
        raise UsageError(
            f"cannot resume from {path}, which holds weights, but no optimizer state and step; leave out "
            "--resume_training to start from them."
        )
    _compare(config, path)
    _hand_over(config, path if path.is_dir() else path.parent, "safetensors", False)
    print(f"load_checkpoint: {path} (weights, read where they are, without a conversion)", flush=True)
    return path


def _hand_over(config: dict, loaded: Path, file_format: str, resume: bool | str) -> None:
    """Write what MindFormers loads into the settings."""
    config |= {"load_checkpoint": str(loaded), "load_ckpt_format": file_format, "resume_training": resume}
    if config.get("checkpoint"):
        config["checkpoint"] |= {"load_path": str(loaded), "no_load_optim": not resume}


def _compare(config: dict, path: Path) -> None:
    """UsageError for tensors that are missing, unknown or of another shape than the model's."""
    if reason := _no_sizes(config):
        print(f"load_checkpoint: not compared with the model: {reason}", flush=True)
        return
    sizes = _sizes_in(config)
    make_plan(list(whole_weights(path, sizes)[1].values()), "mindspore", sizes, str(path))


def _sizes_in(config: dict) -> TelechatSizes:
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


def _no_sizes(config: dict) -> str | None:
    """Why the settings do not tell the model's sizes; None if they do."""
    model_config = section_of(config, "model.model_config")
    if model_config.get("type") != "TelechatConfig":
        return f"model_config is of type {model_config.get('type')}"
    needed = ("num_layers", "hidden_size", "num_heads", "vocab_size")
    if missing := [name for name in needed if not any(model_config.get(key) for key in SPELLINGS[name])]:
        return f"the YAML states no {', '.join(missing)}"
    return None


def _source(path: Path, parallel: bool) -> tuple[Path, str]:
    """The file or folder that ``path`` stands for, and its kind: the latest iteration, the newest file of
    a run's only rank, or ``path`` itself."""
    kind = _kind(path)
    if kind == "iteration":
        return _latest(path), kind
    if kind == "ranks" and not parallel:
        _check_only_rank(path)
        return newest_file(path / "rank_0"), "file"
    if kind == "folder" and not parallel and path.name.startswith("rank_"):
        return newest_file(path), "file"
    return path, kind


def _kind(path: Path) -> str:
    """What ``path`` is: ``file``, ``folder`` of files, ``iteration`` (of the section ``checkpoint:``) or
    ``ranks`` (a folder of ``rank_*`` folders)."""
    if path.is_file():
        if path.suffix in SUFFIXES:
            return "file"
        raise UsageError(f"{path} is no checkpoint: its name must end in .safetensors or .ckpt.")
    if not path.is_dir():
        raise UsageError(f"there is no checkpoint {path}; give --load_checkpoint a path that exists.")
    if (path / TRACKER).is_file() or (path / COMMON).is_file():
        return "iteration"
    if any(path.glob("rank_*/")):
        return "ranks"
    if len(found := {file.suffix for file in path.iterdir()} & set(SUFFIXES)) == 1:
        return "folder"
    if found:
        raise UsageError(f"{path} holds .safetensors and .ckpt files; give the file that is to be loaded.")
    if any(path.glob("iteration_*/")):
        whole = whole_iterations(path)
        instead = f"give the latest that is whole: --load_checkpoint {whole[0]}" if whole else "none is whole"
        raise UsageError(f"{path} holds iterations, but no {TRACKER}, which names the last; {instead}.")
    inside = path / "checkpoint"
    hint = f" Did you mean {inside}?" if inside.is_dir() else ""
    raise UsageError(f"{path} holds no checkpoint: no .safetensors, no .ckpt, no rank_* folder.{hint}")


def _latest(path: Path) -> Path:
    """The iteration that a ``checkpoint`` folder's tracker names, or ``path`` itself."""
    try:
        return latest_iteration(path)
    except UsageError as error:
        whole = whole_iterations(path)
        hint = f": --load_checkpoint {whole[0]} is whole" if whole else ""
        raise UsageError(f"{error}{hint}") from error


def model_files(iteration: Path) -> list[Path]:
    """The files of weights in an ``iteration_*`` folder, one of each rank that saved."""
    files = sorted(iteration.glob("*.safetensors"))
    return [file for file in files if re.search(r"(^|-)model-\d+-\d+$", file.stem)]


def _folder_and_name(file: Path) -> tuple[Path, str]:
    """The folder of the ``rank_*`` folders and the name in them, by which MindFormers resumes from a file."""
    if not file.parent.name.startswith("rank_"):
        raise UsageError(
            f"cannot resume from {file}, which is in no folder rank_0; put it into one, or leave out "
            "--resume_training."
        )
    return file.parent.parent, file.name


def _check_resume(path: Path, kind: str, resume: bool | str, sectioned: bool, parallel: bool) -> None:
    """Refuse what MindFormers 1.9 cannot resume, before it fails half way."""
    if not resume:
        return
    if sectioned and isinstance(resume, str):
        raise UsageError(
            f"resume_training is {resume!r}; expected True where the YAML has the section `checkpoint:`, "
            "and as --load_checkpoint the `checkpoint` folder or one of its iteration_* folders."
        )
    if sectioned and kind != "iteration":
        lacks = COMMON if path.name.startswith("iteration_") else "optimizer state and step"
        raise UsageError(
            f"cannot resume from {path}, which holds weights, but no {lacks}; give the `checkpoint` "
            "folder of a run with the section `checkpoint:`, or leave out --resume_training to start anew."
        )
    if not sectioned and not parallel and not _is_ckpt(path):
        raise UsageError(
            f"cannot resume from {path} on one device: without the section `checkpoint:` MindFormers resumes "
            ".ckpt files only. Add the section to the YAML."
        )


def _check_only_rank(path: Path) -> None:
    """Refuse ``rank_*`` folders but one: they hold slices, which one device cannot join."""
    ranks = sorted(folder.name for folder in path.glob("rank_*/"))
    if ranks != ["rank_0"]:
        raise UsageError(
            f"{path} holds slices of {len(ranks)} ranks ({', '.join(ranks[:8])}); merge them first "
            f"{MERGING}, or load them with --use_parallel True --auto_trans_ckpt True."
        )


def newest_file(folder: Path) -> Path:
    """The file of the highest epoch and step in a ``rank_*`` folder: ``prefix_rank_0-<epoch>_<step>.…``."""
    steps = {}
    for path in folder.iterdir():
        if path.suffix in SUFFIXES and (numbers := re.search(r"-(\d+)_(\d+)$", path.stem)):
            steps[int(numbers[1]), int(numbers[2])] = path
    if not steps:
        raise UsageError(f"{folder} holds no <prefix>-<epoch>_<step>.safetensors or .ckpt; give a file.")
    return steps[max(steps)]


def _is_ckpt(path: Path) -> bool:
    return path.suffix == ".ckpt" or any(path.glob("*.ckpt")) or any(path.glob("rank_*/*.ckpt"))
