"""The work behind run_mindformer.py and run_telechat.py: from a config and overrides to a finished task.

All checks come before MindSpore is imported, which run/trainer.py does. What MindFormers and MindSpore write
relative to the working directory goes to the output directory, or to a temporary one.
"""

import os
from pathlib import Path

from research.telechat2.checkpoint.release.stated import said_of
from research.telechat2.common.errors import UsageError
from research.telechat2.compat.environment import prepare_environment
from research.telechat2.config.evaluation import prepare_evaluation
from research.telechat2.config.optimization import with_float_fields
from research.telechat2.config.overrides import apply_overrides
from research.telechat2.config.preflight import TRAINING, Checked, Facts, preflight
from research.telechat2.config.sharing import processes_of_run
from research.telechat2.config.yaml_files import (
    CHECKOUT,
    SHIPPED,
    read_config,
    resolve_config,
    resolve_folder,
)
from research.telechat2.data.same_vocabulary import check_answering_vocabulary
from research.telechat2.run.dataset import check_dataset, fit_dataset_workers
from research.telechat2.run.end import add_monitor, print_end, print_plan
from research.telechat2.run.load_checkpoint import prepare_checkpoint
from research.telechat2.run.prediction import check_request, check_vocab_file, share_model
from research.telechat2.run.processes import check_cpu_plan, check_npus, check_processes, on_cpu
from research.telechat2.run.save_checkpoint import leave_section_in_data_parallel, settle_monitor
from research.telechat2.run.screen import shown_by_launcher
from research.telechat2.run.space import check_training_memory
from research.telechat2.run.trainer import Task, carry_out
from research.telechat2.run.training import Training, leave_sinks_on_cpus, train

VERBOSE = "show all that MindFormers and MindSpore write, which is kept in OUTPUT_DIR/log/run.log otherwise"


def run(
    config_name: str, overrides: dict[str, object], register_path: str | None = None, verbose: bool = False
) -> list[str] | None:
    """Carry out the task that a config describes: train, finetune, evaluate or predict.

    Args:
        config_name: the YAML; any spelling of ``resolve_config``.
        overrides: dotted key to value, e.g. ``{"runner_config.epochs": 2}``; they win over the YAML.
        register_path: the directory that ``auto_register`` names refer to; research/telechat2 by default.
        verbose: show on the screen, too, what the libraries write to ``<output_dir>/log/run.log``.

    Returns:
        The answers, for a prediction, which are also printed; None otherwise.

    Raises:
        UsageError: whatever a user can mend in the config, the overrides, the data or the checkpoint.
    """
    with shown_by_launcher(verbose):
        path = resolve_config(config_name, Path.cwd())
        register = resolve_folder(register_path, Path.cwd()) if register_path else CHECKOUT / SHIPPED
        print(f"config: {path}", flush=True)
        config = read_config(path)
        shipped_output = config.get("output_dir") or "./output"
        apply_overrides(config, overrides)
        weights = _weights(config)
        checked = _preflight(config, path, register, overrides, weights)
        prepare_environment(config.get("output_dir") or "./output", register)
        _move_output(config, os.environ["LOCAL_DEFAULT_PATH"], shipped_output)
        check_npus(config)
        task = Task(path, overrides, config, weights, verbose)
        if config["run_mode"] in TRAINING:
            _train(task, checked)
            return None
        if config["run_mode"] == "eval":
            return _evaluate(task)
        answers = _predict(task, checked)
        print("\n".join(answers), flush=True)
        return answers


def _preflight(
    config: dict, path: Path, register: Path, overrides: dict[str, object], weights: str | None
) -> Checked:
    """Check the settings by what is known besides, and print what was left out and taken from elsewhere."""
    given = any(key.startswith("model.model_config.") for key in overrides)
    predicts = config.get("run_mode") == "predict"
    facts = Facts(
        source=f"{path} with the command line" if given else str(path),
        task="run",
        register=register,
        devices=processes_of_run() if predicts or "MS_ROLE" in os.environ else None,
        changed=overrides,
        weights=bool(weights),
        said=said_of(config, weights),
    )
    checked = preflight(config, facts)
    for note in (*checked.notes, *(checked.plan.notes if checked.plan else ())):
        print(f"note: {note}", flush=True)
    for line in checked.taken:
        print(line, flush=True)
    return checked


def _weights(config: dict) -> str | None:
    """The weights that the settings name, in one place or in both."""
    given = config.get("load_checkpoint") or None
    other = (config.get("checkpoint") or {}).get("load_path") or None
    if given and other and Path(given).expanduser().resolve() != Path(other).expanduser().resolve():
        raise UsageError(
            f"load_checkpoint is {given}, but checkpoint.load_path is {other}; give --load_checkpoint alone "
            "(--checkpoint.load_path null)."
        )
    return given or other


def _move_output(config: dict, output_dir: str, old: str) -> None:
    """Make ``output_dir`` absolute, and let TensorBoard's events follow it where they lay inside it."""
    place = Path(output_dir)
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "not writable" if place.is_dir() else "no directory"
        raise UsageError(f"output_dir is {output_dir}, but {place} is {reason}; give another --output_dir.")
    config["output_dir"] = output_dir
    board = config.get("tensorboard") or {}
    events = Path(board.get("tensorboard_dir") or "")
    if events.is_relative_to(Path(old)):
        board["tensorboard_dir"] = str(Path(output_dir) / events.relative_to(Path(old)))


def _train(task: Task, checked: Checked) -> None:
    config = task.config
    check_cpu_plan(config)
    if checked.plan and on_cpu(config):
        check_training_memory(config, processes_of_run())
    check_processes(config)
    leave_sinks_on_cpus(config)
    config["optimizer"] = with_float_fields(config["optimizer"])
    files = check_dataset(config, "train", task.weights)
    settle_monitor(config)
    leave_section_in_data_parallel(config)
    if config.get("do_eval"):
        check_dataset(config, "eval", task.weights)
        prepare_evaluation(config, training=True)
    fit_dataset_workers(config)

    def in_trainer(source: Path | None, training: Training) -> None:
        add_monitor(config)
        print_plan(config)
        carry_out(task, source, training)

    train(config, files, in_trainer, task.weights)
    print_end(config, task.path, task.overrides)
    from research.telechat2.run.monitor import TelechatMonitor

    if TelechatMonitor.latest:
        TelechatMonitor.latest.check_end()


def _evaluate(task: Task) -> None:
    config = task.config
    check_cpu_plan(config)
    check_processes(config)
    check_dataset(config, "eval", task.weights)
    prepare_evaluation(config, training=False)
    _load_and_carry_out(task)


def _predict(task: Task, checked: Checked) -> list[str]:
    config = task.config
    if config["run_mode"] == "predict":
        share_model(config, checked.shared)
    else:
        check_cpu_plan(config)
    check_vocab_file(config)
    check_request(config)
    check_answering_vocabulary(config["processor"]["tokenizer"]["vocab_file"], task.weights)
    return _load_and_carry_out(task)


def _load_and_carry_out(task: Task) -> list[str] | None:
    fit_dataset_workers(task.config)
    source = prepare_checkpoint(task.config, training=False)
    print_plan(task.config)
    return carry_out(task, source)
