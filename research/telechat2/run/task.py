"""The work behind run_mindformer.py and run_telechat.py: from a config and overrides to a finished task.

MindFormers and MindSpore write relative to the working directory: logs, copies of registered modules, the
answers of a prediction, the graph of a failed compilation. All of it is steered into the output directory,
or into a temporary one, so that nothing else appears where a user works.
"""

import os
import sys
import traceback
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

from research.telechat2.checkpoint.llama.stated import said_of
from research.telechat2.common.errors import UsageError
from research.telechat2.compat.environment import prepare_environment
from research.telechat2.config.evaluation import prepare_evaluation
from research.telechat2.config.optimization import with_float_fields
from research.telechat2.config.overrides import apply_overrides
from research.telechat2.config.preflight import TRAINING, Checked, Facts, preflight
from research.telechat2.config.sections import section_of
from research.telechat2.config.sharing import processes_of_run
from research.telechat2.config.yaml_files import (
    CHECKOUT,
    SHIPPED,
    read_config,
    resolve_config,
    resolve_folder,
)
from research.telechat2.data.same_vocabulary import check_answering_vocabulary, check_data_vocabulary
from research.telechat2.run.dataset import check_dataset, fit_dataset_workers, record_files
from research.telechat2.run.end import add_monitor, print_end, print_plan
from research.telechat2.run.load_checkpoint import prepare_checkpoint
from research.telechat2.run.memory import check_training_memory
from research.telechat2.run.prediction import (
    check_request,
    check_vocab_file,
    keep_top_k,
    prepare_prompts,
    seed_sampling,
    share_model,
)
from research.telechat2.run.processes import check_cpu_plan, check_npus, check_processes
from research.telechat2.run.save_checkpoint import (
    answers_file,
    checkpoint_folder,
    leave_section_in_data_parallel,
    settle_monitor,
)
from research.telechat2.run.screen import EXPECTED, EXPECTED_RESUMING, Both, own_lines, shown_by_launcher
from research.telechat2.run.training import Training, leave_sinks_on_cpus, train
from research.telechat2.run.weights import hush_loaders
from research.telechat2.text import prompt_format as prompt_formats

VERBOSE = "show all that MindFormers and MindSpore write, which is kept in OUTPUT_DIR/log/run.log otherwise"


def run(
    config_name: str, overrides: dict[str, object], register_path: str | None = None, verbose: bool = False
) -> list | None:
    """Carry out the task that a config describes: train, finetune, evaluate or predict.

    What MindFormers and MindSpore write goes to ``<output_dir>/log/run.log``; see run/screen.py.

    Args:
        config_name: the YAML; any spelling of ``resolve_config``.
        overrides: dotted key to value, e.g. ``{"runner_config.epochs": 2}``; they win over the YAML.
        register_path: the directory that ``auto_register`` names refer to; research/telechat2 by default.
        verbose: show on the screen what the libraries write, too.

    Returns:
        The answers, for a prediction, which are also printed; None otherwise.

    Raises:
        UsageError: whatever a user can mend in the config, the overrides, the data or the checkpoint.
    """
    with shown_by_launcher(verbose):
        answers = _run(config_name, overrides, register_path, verbose)
        if answers is not None:
            print("\n".join(answers), flush=True)
        return answers


def _run(config_name: str, overrides: dict[str, object], register_path: str | None, verbose: bool):
    cwd = Path.cwd()
    path = resolve_config(config_name, cwd)
    register = resolve_folder(register_path, cwd) if register_path else CHECKOUT / SHIPPED
    print(f"config: {path}", flush=True)
    config = read_config(path)
    shipped_output = config.get("output_dir") or "./output"
    apply_overrides(config, overrides)
    weights = _weights(config)
    checked = _preflight(config, path, register, overrides, weights)
    prepare_environment(config.get("output_dir") or "./output", register)
    _move_output(config, os.environ["LOCAL_DEFAULT_PATH"], shipped_output)
    mode = config["run_mode"]
    training = mode in TRAINING
    check_npus(config)
    if mode == "predict":
        share_model(config, checked.shared)
    else:
        check_cpu_plan(config)
    if mode.startswith("predict"):
        check_vocab_file(config)
        check_request(config)
        check_answering_vocabulary(config["processor"]["tokenizer"]["vocab_file"], weights)
    if checked.plan and section_of(config, "context").get("device_target") == "CPU":
        check_training_memory(config, processes_of_run())
    if mode in (*TRAINING, "eval"):
        check_processes(config)
    if training:
        leave_sinks_on_cpus(config)
        config["optimizer"] = with_float_fields(config["optimizer"])
        check_dataset(config, "train")
        check_data_vocabulary(record_files(config, "train"), weights)
        settle_monitor(config)
        leave_section_in_data_parallel(config)
    if mode == "eval" or (training and config.get("do_eval")):
        check_dataset(config, "eval")
        check_data_vocabulary(record_files(config, "eval"), weights)
        prepare_evaluation(config, training=training)
    fit_dataset_workers(config)
    carry_out = partial(_show_and_carry_out, path=path, verbose=verbose)
    if not training:
        return carry_out(config, prepare_checkpoint(config, training=False))
    train(config, carry_out, weights)
    print_end(config, path, overrides)
    _check_end()
    return None


def _check_end() -> None:
    """Fail where a training has ended with a loss that is not finite."""
    from research.telechat2.run.monitor import TelechatMonitor

    if TelechatMonitor.latest:
        TelechatMonitor.latest.check_end()


def _show_and_carry_out(
    config: dict, source: Path | None, training: Training | None = None, *, path: Path, verbose: bool
) -> list | None:
    """``_carry_out`` with this plugin's lines on the screen."""
    if training:
        add_monitor(config)
    print_plan(config)
    hidden = EXPECTED_RESUMING if config.get("resume_training") else EXPECTED
    with own_lines(config["output_dir"], verbose, hidden):
        return _carry_out(config, source, training, path)


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
            f"load_checkpoint is {given} and checkpoint.load_path is {other}: which of them is loaded? Give "
            "--load_checkpoint alone (--checkpoint.load_path null)."
        )
    return given or other


def _check_output(folder: Path) -> None:
    """Refuse an output folder that cannot be made, before any work."""
    place = folder
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"output_dir is {folder}, but {place} is no directory; give another --output_dir.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir is {folder}, but {place} is not writable; give another --output_dir.")


def _move_output(config: dict, output_dir: str, old: str) -> None:
    """Make ``output_dir`` absolute, and let TensorBoard's events follow it where they lay inside it."""
    _check_output(Path(output_dir))
    config["output_dir"] = output_dir
    board = config.get("tensorboard") or {}
    events = Path(board.get("tensorboard_dir") or "")
    if events.is_relative_to(Path(old)):
        board["tensorboard_dir"] = str(Path(output_dir) / events.relative_to(Path(old)))


def _carry_out(raw: dict, source: Path | None, training: Training | None, path: Path) -> list | None:
    """Build MindFormers' config and context, and run its Trainer.

    Args:
        raw: the settings.
        source: what our own reader loads; None: MindFormers' loaders load.
        training: for a training, what ``run.training`` found of it.
        path: of the YAML.
    """
    if raw["run_mode"].startswith("predict"):
        others = Path(os.environ["OM_MODULES_CACHE"]) / "answers.txt"  # of processes but the first: the same
        raw["save_file"] = str(answers_file(raw) if os.environ.get("RANK_ID", "0") == "0" else others)
    config = _build_config(raw, path)
    if config.run_mode in TRAINING:
        _record_prompt_format(config)
    if config.run_mode.startswith("predict"):
        config.input_data = prepare_prompts(config)
        keep_top_k(config)
    import research.telechat2.run.registered  # noqa: F401 registers the classes that YAMLs name
    from research.telechat2.compat.evaluation import evaluating_on
    from research.telechat2.compat.library import (
        Trainer,
        build_context,
        check_in_modelarts,
        naming_data,
        naming_target,
        print_configs_to,
        set_output_path,
    )
    from research.telechat2.run.evaluation_data import evaluation_data

    if config.remote_save_url and not check_in_modelarts():
        raise UsageError(
            f"remote_save_url is {config.remote_save_url}, but results are uploaded on "
            "ModelArts only; remove it from the command or the YAML."
        )
    set_output_path(config.output_dir)
    hush_loaders()
    print_configs_to(sys.stdout.log if isinstance(sys.stdout, Both) else None)
    try:
        with naming_target(config.context.device_target):
            build_context(config)
        with naming_data(), evaluating_on(evaluation_data), _own_loader(source), _watched(training):
            return _run_task(Trainer(config), config)
    except (ValueError, OSError) as error:
        raise UsageError(f"{error}{_save_traceback(config.output_dir)}") from error


def _watched(training: Training | None):
    """Have a training's position checked when the data is open, and its record saved with each checkpoint."""
    if training is None:
        return nullcontext()
    from research.telechat2.run.checkpoint_monitor import recording
    from research.telechat2.run.starting import starting_right

    stack = ExitStack()
    stack.enter_context(recording(training.record))
    stack.enter_context(starting_right(training.check))
    return stack


def _own_loader(source: Path | None):
    """Have the Trainer load ``source`` by our own reader; None: by its own loaders."""
    if source is None:
        return nullcontext()
    from research.telechat2.compat.loading import loading_with
    from research.telechat2.run.weights import load_network

    return loading_with(partial(load_network, source))


def _build_config(raw: dict, path: Path):
    """Fill in MindFormers' template, with its complaints as sentences."""
    from research.telechat2.compat.library import ConfigTemplate, MindFormerConfig

    try:
        ConfigTemplate.apply_template(raw)
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"MindFormers does not accept {path} with these settings: {error.args[0]}."
        ) from error
    return MindFormerConfig(**raw)


def _record_prompt_format(config) -> None:
    """Carry the format that the data was rendered in over to the checkpoints."""
    dataset = (config.train_dataset.data_loader or {}).get("dataset_dir")
    prompt_format = prompt_formats.of_dataset(dataset) if isinstance(dataset, str) and dataset else None
    if prompt_format is None:
        print(
            "prompt format: not recorded, as the data has no manifest that tells it; name it to "
            "run_telechat_predict.py with --prompt_format",
            flush=True,
        )
        return
    folder = checkpoint_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    prompt_formats.write(folder, prompt_format)
    print(f"prompt format: {prompt_format} (recorded in {folder})", flush=True)


def _run_task(trainer, config) -> list | None:
    weights = config.load_checkpoint or None
    if config.run_mode in TRAINING:
        train = trainer.train if config.run_mode == "train" else trainer.finetune
        try:
            train(resume_from_checkpoint=weights)
        finally:
            _finish_monitor()
    elif config.run_mode == "eval":
        trainer.evaluate(eval_checkpoint=weights or False)
    else:
        return _predict(trainer, config, weights)
    return None


def _finish_monitor() -> None:
    """Draw the loss curve, however the training ended."""
    from research.telechat2.run.monitor import TelechatMonitor

    if TelechatMonitor.latest:
        TelechatMonitor.latest.finish()


def _predict(trainer, config, weights: str | None) -> list:
    seed_sampling(config)
    results = trainer.predict(
        predict_checkpoint=weights, input_data=config.input_data, batch_size=config.predict_batch_size
    )
    print(f"answers: also in {config.save_file}", flush=True)
    return [text for result in results for text in _texts(result)]


def _texts(result) -> list[str]:
    text = result["text_generation_text"]
    return [text] if isinstance(text, str) else list(text)


def _save_traceback(output_dir: str) -> str:
    """Keep the traceback of an error that is printed as one sentence, and say where; not on a full disk."""
    path = Path(output_dir) / "log" / f"traceback_{os.getpid()}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return ""
    return f"\n(traceback: {path})"
