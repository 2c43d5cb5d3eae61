"""Where a run saves its checkpoints and answers, and the refusal to save over those of another."""

import re
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path

from research.telechat2.checkpoint.release.written import trained_config
from research.telechat2.checkpoint.sizes import CONFIG, config_beside
from research.telechat2.checkpoint.storage.folders import latest_iteration
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import read_json, write_json
from research.telechat2.config.sections import section_of
from research.telechat2.config.settings import model_config, with_defaults
from research.telechat2.data.same_vocabulary import HASH_KEY, data_vocabulary
from research.telechat2.run.processes import is_data_parallel
from research.telechat2.text import prompt_format as prompt_formats

# the section `checkpoint:` -> the callback CheckpointMonitor
MONITOR_KEYS = {
    "save_max": "keep_checkpoint_max",
    "save_interleaved_steps": "save_checkpoint_steps",
    "save_path": "directory",
    "prefix": "prefix",
    "async_save": "async_save",
}


def monitors(config: dict) -> list[dict]:
    """The callbacks CheckpointMonitor of a YAML."""
    return [each for each in config.get("callbacks") or [] if each.get("type") == "CheckpointMonitor"]


def settle_monitor(config: dict) -> None:
    """Join what the section ``checkpoint:`` and the callback CheckpointMonitor say, in place.

    Where there is the section MindFormers 1.9 reads it alone; what only the callback says is moved there.

    Raises:
        UsageError: both state a setting, and differ.
    """
    section = config.get("checkpoint")
    for callback in monitors(config) if section else []:
        for name, key in MONITOR_KEYS.items():
            given, value = callback.get(key), section.get(name)
            if given is None:
                continue
            if value is not None and value != given:
                raise UsageError(
                    f"CheckpointMonitor.{key} is {given!r}, but checkpoint.{name} is "
                    f"{value!r}; give --checkpoint.{name} {given}, or leave {key} out of the callback."
                )
            section[name] = given


def leave_section_in_data_parallel(config: dict) -> None:
    """Give the settings of the section ``checkpoint:`` to the CheckpointMonitor of a data parallel run.

    The section's format needs a compiled plan, which data parallelism has not: MindFormers 1.9 fails at the
    first save. Each rank then saves the whole model in its ``rank_*`` folder.
    """
    section = config.get("checkpoint")
    if not section or not is_data_parallel(config):
        return
    del config["checkpoint"]
    config["load_checkpoint"] = config.get("load_checkpoint") or section.get("load_path")
    settings = {new: section[old] for old, new in MONITOR_KEYS.items() if section.get(old) is not None}
    settings["save_optimizer"] = not section.get("no_save_optim", True)
    for callback in monitors(config):
        callback.update({"checkpoint_format": "safetensors"} | settings)
    print("checkpoint: data parallel, so each rank saves the whole model into checkpoint/rank_*", flush=True)


def refuse_overwriting(config: dict) -> None:
    """Refuse to train into a folder whose iterations or ``rank_*`` weights this run does not continue.

    Folders and files are named by step alone, so a second run would replace the first's; so would a run that
    continues from a step before the last.
    """
    folder = checkpoint_folder(config)
    if config.get("checkpoint"):
        _refuse_iterations(config, folder)
    else:
        _refuse_ranks(config, folder)


def _refuse_iterations(config: dict, folder: Path) -> None:
    iterations = sorted(folder.glob("iteration_*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
    if not iterations:
        return
    source = Path(config["checkpoint"].get("load_path") or "").resolve()
    if not config.get("resume_training") or source.parent != folder.resolve():
        raise UsageError(
            f"{folder} holds {iterations[-1].name} of an earlier run; give another --output_dir, continue "
            f"that run (--load_checkpoint {folder} --resume_training True), or delete the folder."
        )
    # A run that was killed while it saved leaves an iteration that the tracker does not name yet.
    latest = {iterations[-1].resolve(), latest_iteration(folder).resolve()}
    if source not in latest:
        raise UsageError(
            f"a run from {source.name} would replace {iterations[-1].name} in {folder}; give another "
            f"--output_dir, or continue the last one (--load_checkpoint {folder} --resume_training True)."
        )


def _refuse_ranks(config: dict, folder: Path) -> None:
    """Without the section, CheckpointMonitor saves ``rank_*/<prefix>…``."""
    saved = [path for path in sorted(folder.glob("rank_*/*")) if path.suffix in (".safetensors", ".ckpt")]
    continued = config.get("resume_training") and Path(config.get("load_checkpoint") or "").resolve()
    if saved and not (continued and continued.is_relative_to(folder.resolve())):
        raise UsageError(
            f"{folder} holds {saved[-1].relative_to(folder)} of an earlier run; give another --output_dir, "
            "or delete the folder."
        )


def checkpoint_folder(config: dict) -> Path:
    """The folder that a training run writes its checkpoints into."""
    output = Path(config.get("output_dir") or "./output")
    if section := config.get("checkpoint"):
        folder = section.get("save_path") or output / "checkpoint"
    else:
        given = next((callback.get("directory") for callback in monitors(config)), None)
        folder = Path(given or output) / "checkpoint"
    return Path(folder).expanduser().absolute()


def record_config(config: dict, weights: str | None, data: Iterable[Path] = ()) -> None:
    """Write the config.json of what this run trains into its checkpoint folder.

    Args:
        config: the settings, ``model_config`` as settled with ``weights``.
        weights: what the run begins with; None: random weights.
        data: the MindRecord files that it trains on.
    """
    if section_of(config, "model.model_config").get("type") != "TelechatConfig":
        return
    fields = model_config(config, with_defaults(config, "parallel_config"))
    source = config_beside(Path(weights).expanduser()) if weights else None
    content = trained_config(fields, read_json(source) if source else None, from_scratch=not weights)
    if vocabulary := data_vocabulary(data):
        content[HASH_KEY] = vocabulary
    folder = checkpoint_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, content)


def record_prompt_format(config: dict) -> None:
    """Carry the format that the data was rendered in over to the checkpoints."""
    dataset = section_of(config, "train_dataset.data_loader").get("dataset_dir")
    prompt_format = prompt_formats.of_dataset(dataset) if isinstance(dataset, str) and dataset else None
    if prompt_format is None:
        hint = "give run_telechat_predict.py --prompt_format"
        print(f"prompt format: not recorded, as no manifest of the data names it; {hint}", flush=True)
        return
    folder = checkpoint_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    prompt_formats.write(folder, prompt_format)
    print(f"prompt format: {prompt_format} (recorded in {folder})", flush=True)


def answers_file(config: dict) -> Path:
    """The file for a prediction's answers: the YAML's ``save_file``, which must not exist, or the first free
    name of ``<output_dir>/text_generation_result.txt``, ``…_2.txt`` and so on."""
    if given := config.get("save_file"):
        path = Path(given).expanduser().absolute()
        if path.exists():
            raise UsageError(f"save_file {path} exists and is not overwritten; give another name.")
        return path
    stem = Path(config["output_dir"], "text_generation_result")
    paths = (Path(f"{stem}{suffix}.txt") for suffix in chain([""], (f"_{number}" for number in count(2))))
    return next(path for path in paths if not path.exists())
