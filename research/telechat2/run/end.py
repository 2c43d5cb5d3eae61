"""The first and the last lines of a task: what runs on what; where the results are, and what to type next."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from research.telechat2.checkpoint.storage.folders import latest_iteration
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import read_json
from research.telechat2.config.sections import section_of
from research.telechat2.config.yaml_files import CHECKOUT, SHIPPED
from research.telechat2.data.same_vocabulary import sha256
from research.telechat2.run.load_checkpoint import SUFFIXES, newest_file
from research.telechat2.run.metrics import NAME, find_metrics
from research.telechat2.run.processes import is_data_parallel
from research.telechat2.run.save_checkpoint import checkpoint_folder
from research.telechat2.text.prompt_format import MANIFEST_SUFFIX, manifest_path

MONITOR = "TelechatMonitor"
DEGREES = ("data_parallel", "model_parallel", "context_parallel", "expert_parallel", "pipeline_stage")


def add_monitor(config: dict) -> None:
    """Have every training show its progress; a resumed one goes on with the curve of the run it continues.

    Changes ``config``, the raw YAML with overrides.
    """
    callbacks = config["callbacks"] = list(config.get("callbacks") or [{"type": "MFLossMonitor"}])
    kinds = [callback.get("type") for callback in callbacks]
    if MONITOR not in kinds:
        callbacks.append({"type": MONITOR})
    if config.get("resume_training"):
        source = (config.get("checkpoint") or {}).get("load_path") or config.get("load_checkpoint") or ""
        if found := find_metrics(source):
            monitor = next(callback for callback in callbacks if callback.get("type") == MONITOR)
            monitor["history"] = str(found)
    if "CheckpointMonitor" not in kinds:
        print("checkpoint: none is saved, as `callbacks` names no CheckpointMonitor", flush=True)


def print_plan(config: dict) -> None:
    """Print the processes of a task, and its sizes."""
    section = section_of(config, "parallel_config")
    target = section_of(config, "context").get("device_target", "Ascend")
    parts = [f"1 process on {target}"]
    if config.get("use_parallel"):
        workers = os.environ.get("MS_WORKER_NUM") or os.environ.get("RANK_SIZE") or "several"
        degrees = [f"{name} {section[name]}" for name in DEGREES if (section.get(name) or 1) != 1]
        parts = [f"{workers} processes on {target}", " x ".join(degrees)]
    if not str(config.get("run_mode")).startswith("predict"):
        parts.append(f"batch_size {section_of(config, 'runner_config').get('batch_size', 1)}")
        if (section.get("micro_batch_num") or 1) > 1 and config.get("use_parallel"):
            parts.append(f"micro_batch_num {section['micro_batch_num']}")
    if seq_length := section_of(config, "model.model_config").get("seq_length"):
        parts.append(f"seq_length {seq_length}")
    print(f"plan: {', '.join(filter(None, parts))}", flush=True)


def print_end(config: dict, path: Path, overrides: dict) -> None:
    """Print where a training has left its checkpoint and its curve, and a command that goes on from there."""
    output, saved = Path(config["output_dir"]), saved_checkpoint(config)
    print(f"checkpoint: {saved or 'none was saved'}", flush=True)
    pictures = sorted(output.glob("loss_curve*.png"), key=lambda file: file.stat().st_mtime)
    if pictures:
        print(f"loss curve: {pictures[-1]} (its numbers: {output / NAME})", flush=True)
    if events := (config.get("tensorboard") or {}).get("tensorboard_dir"):
        print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(events))}", flush=True)
    if saved:
        purpose, words = next_command(config, path, overrides, saved)
        print(f"next, {purpose}:\n  {shlex.join(words)}", flush=True)


def saved_checkpoint(config: dict) -> Path | None:
    """What a command is given to read the weights of this run; None: nothing was saved."""
    folder = checkpoint_folder(config)
    if config.get("checkpoint"):
        return latest_iteration(folder) if any(folder.glob("iteration_*")) else None
    holds = {
        rank for suffix in SUFFIXES for rank in (file.parent for file in folder.glob(f"rank_*/*{suffix}"))
    }
    if not (ranks := sorted(holds)):
        return None
    return newest_file(ranks[0]) if is_data_parallel(config) or len(ranks) == 1 else folder


def next_command(config: dict, path: Path, overrides: dict, saved: Path) -> tuple[str, list[str]]:
    """What most people do after this training: its purpose, and the words of the command line."""
    if config.get("use_parallel") and not is_data_parallel(config):
        words = ["--src_ckpt_strategy", Path(config["output_dir"]) / "strategy", "--src_ckpt_dir", saved]
        words += ["--dst_ckpt_dir", Path(config["output_dir"]) / "merged"]
        return "to merge the slices", _python("transform_ckpt.py", *words)
    changed = {key: value for key, value in overrides.items() if key.split(".")[0] in ("model", "moe_config")}
    predict = path.with_name(path.name.replace("finetune", "predict"))
    data = section_of(config, "train_dataset.data_loader").get("dataset_dir") or ""
    vocab = _vocabulary(Path(data)) if isinstance(data, str) and data else None
    if predict != path and predict.is_file() and vocab and not changed:
        words = ["--yaml_file", predict, "--vocab_file_path", vocab, "--checkpoint_path", saved]
        return "to ask the model", _python("run_telechat_predict.py", *words)
    words = ["--config", path, "--run_mode", "eval", "--load_checkpoint", saved, "--eval_dataset_dir", data]
    words += ["--output_dir", f"{config['output_dir']}_eval"]
    if config.get("use_parallel"):
        words += ["--use_parallel", "False"]
    for key, value in changed.items():
        words += [f"--{key}", value]
    return "loss and perplexity", _python("run_mindformer.py", *words)


def _python(script: str, *words) -> list[str]:
    """A command line for a script of this checkout, with absolute paths: it is pasted anywhere."""
    file = CHECKOUT / script if (CHECKOUT / script).is_file() else CHECKOUT / SHIPPED / script
    active = Path(shutil.which("python") or "").absolute() == Path(sys.executable).absolute()
    absolute = (str(word.absolute() if isinstance(word, Path) else word) for word in (file, *words))
    return ["python" if active else sys.executable, *absolute]


def _vocabulary(data: Path) -> Path | None:
    """The tokenizer.model that the data was made with, if it is still where it was."""
    try:
        inside = data.is_dir() and sorted(data.glob(f"*.mindrecord{MANIFEST_SUFFIX}"))[0]
        tokenizer = (read_json(inside or manifest_path(data)) or {})["tokenizer"]
        name, expected = Path(tokenizer["path"]), tokenizer["sha256"]
    except (OSError, UsageError, KeyError, TypeError, IndexError):
        return None
    for folder in (Path.cwd(), *data.absolute().parents[:3]):
        file = (folder / name).absolute()
        if file.is_file() and sha256(file) == expected:
            return file
    return None
