"""A task in MindFormers' Trainer, which is imported here, after all that can be checked without it."""

import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.run.prediction import keep_top_k, prepare_prompts, seed_sampling
from research.telechat2.run.resuming import initial_epoch
from research.telechat2.run.save_checkpoint import answers_file
from research.telechat2.run.screen import Both, own_lines
from research.telechat2.run.training import Training


@dataclass(frozen=True)
class Task:
    """What a command was asked for.

    Attributes:
        path, overrides: the YAML, and dotted key to value of what the command line changed of it.
        config: the settings that come of both.
        weights: what the user gives to load; None: nothing.
        verbose: show on the screen what the libraries write, too.
    """

    path: Path
    overrides: dict[str, object]
    config: dict
    weights: str | None
    verbose: bool


def carry_out(task: Task, source: Path | None, training: Training | None = None) -> list[str] | None:
    """Run the Trainer, with this plugin's lines on the screen.

    Args:
        task: checked; MindFormers' defaults are filled into its config.
        source: what our own reader loads; None: MindFormers' loaders load.
        training: None of a prediction or an evaluation.

    Returns:
        The answers of a prediction.

    Raises:
        UsageError: MindFormers refuses the settings, or the data cannot be read.
    """
    with own_lines(task.config["output_dir"], task.verbose, bool(task.config.get("resume_training"))):
        from research.telechat2.compat.refusal import is_refusal

        try:
            return _run_trainer(task, source, training)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, UsageError) or not is_refusal(error):
                raise
            kept = _save_traceback(Path(task.config["output_dir"]))
            raise UsageError(f"MindFormers refuses {task.path}: {error} Correct that.{kept}") from error


def _run_trainer(task: Task, source: Path | None, training: Training | None) -> list[str] | None:
    import research.telechat2.run.registered  # noqa: F401 registers the classes that YAMLs name
    from research.telechat2.compat.library import (
        Trainer,
        build_context,
        check_in_modelarts,
        mindformers_config,
        naming_data,
        naming_target,
        set_output_path,
    )
    from research.telechat2.compat.trainer import run_by

    predicting = task.config["run_mode"].startswith("predict")
    if predicting:
        first = os.environ.get("RANK_ID", "0") == "0"  # the others have the same answers, which nobody reads
        unread = Path(os.environ["OM_MODULES_CACHE"], "answers.txt")
        task.config["save_file"] = str(answers_file(task.config) if first else unread)
    config = mindformers_config(task.config)
    if predicting:
        config.input_data = prepare_prompts(config)
        keep_top_k(config)
    if config.remote_save_url and not check_in_modelarts():
        raise UsageError(f"remote_save_url is {config.remote_save_url}, for ModelArts only; leave it out.")
    set_output_path(config.output_dir)
    with naming_target(config.context.device_target):
        build_context(config)
    with naming_data(), run_by(_hooks(source, training)):
        trainer = Trainer(config)
        weights = config.load_checkpoint or None
        if predicting:
            return _predict(trainer, config, weights)
        if training is None:
            trainer.evaluate(eval_checkpoint=weights or False)
        else:
            _train(trainer.train if config.run_mode == "train" else trainer.finetune, weights)
    return None


def _hooks(source: Path | None, training: Training | None):
    from research.telechat2.compat.trainer import TrainerHooks
    from research.telechat2.run.checkpoint_monitor import CheckpointMonitor
    from research.telechat2.run.evaluation_data import evaluation_data
    from research.telechat2.run.train_step import MFTrainOneStepCell

    CheckpointMonitor.training = training
    return TrainerHooks(
        load=partial(load_network, source) if source else None,
        evaluation_data=evaluation_data,
        opened=partial(_start_right, training) if training else None,
        classes=(("callback", CheckpointMonitor), ("wrapper", MFTrainOneStepCell)),
        configs=sys.stdout.log if isinstance(sys.stdout, Both) else None,
    )


def _start_right(training: Training, config) -> None:
    """Complete the record, and compare a run that resumes with it, before the model is built."""
    runner = config.runner_config
    training.open(config.data_size, runner.global_batch_size, runner.initial_step, runner.get("step_scale"))
    if runner.initial_step:  # MindFormers counts by the checkpoint's epoch, however long epochs are now
        sink_size = runner.sink_size if runner.sink_mode else 0
        runner.initial_epoch = initial_epoch(runner.initial_step, config.data_size, sink_size)


def load_network(source: Path, network, layouts: Mapping[str, tuple]) -> None:
    """Fill the network of a task from ``source``; every process reads what it stores, and no more.

    Args:
        source: what ``whole_weights`` or the network's own ``load_weights`` reads.
        network: the model, perhaps wrapped; compiled, if ``layouts`` are not empty.
        layouts: MindSpore's, of the parameters that this process has slices of.
    """
    if hasattr(network, "load_weights"):
        network.load_weights(source)
        print(f"load_checkpoint: loaded this rank's part of {source}", flush=True)
        return
    from research.telechat2.checkpoint.layouts.read import whole_weights
    from research.telechat2.checkpoint.loading import load_slices, load_tensors
    from research.telechat2.checkpoint.sizes import sizes_of_model
    from research.telechat2.compat.library import place_in_group, process_group
    from research.telechat2.telechat_config import TelechatConfig

    configs = (getattr(cell, "config", None) for _, cell in network.cells_and_names())
    config = next(config for config in configs if isinstance(config, TelechatConfig))
    _, whole = whole_weights(source, sizes_of_model(config))
    if layouts:
        load_slices(network, whole, layouts, process_group()[1], place_in_group, str(source))
    else:
        load_tensors(network, whole, str(source))
    print(f"load_checkpoint: loaded {len(whole):,} tensors from {source}", flush=True)


def _train(train, weights: str | None) -> None:
    """Train, and draw the loss curve however that ends."""
    from research.telechat2.run.monitor import TelechatMonitor

    try:
        train(resume_from_checkpoint=weights)
    finally:
        if TelechatMonitor.latest:
            TelechatMonitor.latest.finish()


def _predict(trainer, config, weights: str | None) -> list[str]:
    seed_sampling(config)
    results = trainer.predict(
        predict_checkpoint=weights, input_data=config.input_data, batch_size=config.predict_batch_size
    )
    print(f"answers: also in {config.save_file}", flush=True)
    texts = [result["text_generation_text"] for result in results]
    return [text for each in texts for text in ([each] if isinstance(each, str) else each)]


def _save_traceback(output: Path) -> str:
    """Keep the traceback of an error that is printed as one sentence; returns where, "" on a full disk."""
    path = output / "log" / f"traceback_{os.getpid()}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return ""
    return f"\n(traceback: {path})"
