"""Settings of other releases that have no effect here: left out with a note, so that such a YAML runs.

MindFormers' own research/telechat2 and the fork of the torch release write keys that nothing reads any more.
What such a key asks for and would not get is no note but a line to change.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from research.telechat2.config.key_check import MODEL
from research.telechat2.config.model import DEAD_KEYS
from research.telechat2.config.sections import Settings, sections_at

_TUNING = "MindFormers 1.9 tunes no data set by it"
_GRAPHS = "MindSpore fuses operators by context.jit_config.jit_level"
# section -> key -> why it has no effect, whatever its value
_NOTED = {
    "": {"auto_tune": _TUNING, "filepath_prefix": _TUNING, "autotune_per_step": _TUNING},
    "parallel_config": {"optimizer_shard": "parallel.enable_parallel_optimizer decides on that"},
    "context": {
        "enable_graph_kernel": _GRAPHS,
        "graph_kernel_flags": _GRAPHS,
        "runtime_num_threads": "MindFormers 1.9 does not read it",
        "enable_dump": "MindFormers 1.9 does not read it",
        "save_dump_path": "MindFormers 1.9 does not read it",
    },
    "train_dataset": {
        "batch_size": "runner_config.batch_size decides on that",
        "seed": "the seed at the top of the YAML decides on the order",
    },
    "eval_dataset": {"batch_size": "runner_config.batch_size decides on that"},
    MODEL: {
        "auto_map": "the classes are this project's; MindIE reads the one that build_mindie_folder.py writes"
    },
}
_CALLBACKS = {"ObsMonitor": "MindFormers 1.9 has none; outside of ModelArts it did nothing"}
_URL = re.compile(r"(obs|s3|https?)://\S+")
_TRAINING_ONLY = (
    "runner_config", "optimizer", "lr_schedule", "grouped_lr_schedule", "train_dataset",
    "train_dataset_task", "eval_dataset", "eval_dataset_task", "recompute_config", "callbacks",
    "eval_callbacks", "metric", "runner_wrapper", "checkpoint", "monitor_config",
)  # fmt: skip


def leave_out(settings: Settings) -> tuple[list[str], list[str]]:
    """Take out of ``settings``, in place, what has no effect here.

    Returns:
        A note for each such setting, and a message for each that must be changed.
    """
    notes = [*_noted(settings), *_callbacks(settings), *_texts_for_nothing(settings)]
    notes += _not_on_cpus(settings)
    problems: list[str] = []
    for found, problem in _dead_model_keys(settings):
        (problems if problem else notes).append(found)
    return notes, [*problems, *_to_change(settings), *_stop_step(settings)]


def _without_effect(place: str, key: str, reason: str) -> str:
    return f"{place}.{key} has no effect: {reason}.".lstrip(".")


def _noted(settings: Settings) -> Iterator[str]:
    for path, keys in _NOTED.items():
        for place, section in sections_at(settings, path):
            for key in [key for key in keys if key in section]:
                del section[key]
                yield _without_effect(place, key, keys[key])
    for which in ("train", "eval"):  # the same section once more
        for _, section in sections_at(settings, f"{which}_dataset_task.dataset_config"):
            for key in _NOTED[f"{which}_dataset"]:
                section.pop(key, None)


def _callbacks(settings: Settings) -> Iterator[str]:
    for name in ("callbacks", "eval_callbacks"):
        listed = settings.get(name)
        if not isinstance(listed, list):
            continue
        types = [callback.get("type") if isinstance(callback, dict) else None for callback in listed]
        for kind in dict.fromkeys(kind for kind in types if kind in _CALLBACKS):
            yield f"{name}: {kind} has no effect: {_CALLBACKS[kind]}."
        settings[name] = [
            callback for callback, kind in zip(listed, types, strict=True) if kind not in _CALLBACKS
        ]


def _not_on_cpus(settings: Settings) -> Iterator[str]:
    """What MindSpore fails to compile there, and changes no number: recomputation ("Graph cycle exists"), and
    the monitor, which writes by an operator."""
    if not any(context.get("device_target") == "CPU" for _, context in sections_at(settings, "context")):
        return
    for place, recompute in sections_at(settings, "recompute_config"):
        for key in ("recompute", "select_recompute", "select_comm_recompute"):
            if recompute.get(key):
                del recompute[key]
                yield f"{place}.{key} is left out: it changes no number, and MindSpore has none on CPUs."
    for place, monitor in sections_at(settings, "monitor_config"):
        if monitor.get("monitor_on") is True:
            monitor["monitor_on"] = False
            yield f"{place}.monitor_on is left out: it writes by TensorDump, which MindSpore lacks on CPUs."


def _texts_for_nothing(settings: Settings) -> Iterator[str]:
    """Placeholders that stand in published YAMLs as if they were values."""
    url = settings.get("remote_save_url")
    if isinstance(url, str) and url and not _URL.fullmatch(url):
        del settings["remote_save_url"]
        yield f"remote_save_url has no effect: {url!r} is no address."
    for _, context in sections_at(settings, "context"):
        if isinstance(context.get("affinity_cpu_list"), str):
            given = context.pop("affinity_cpu_list")
            yield f"context.affinity_cpu_list has no effect: {given!r} is no section of devices and cores."
    for _, model in sections_at(settings, MODEL):
        name = model.get("checkpoint_name_or_path")
        if isinstance(name, str) and name and not Path(name).expanduser().exists():
            del model["checkpoint_name_or_path"]
            yield (
                f"{MODEL}.checkpoint_name_or_path has no effect: there is no file {name}, and names of "
                "releases are not looked up; load_checkpoint says which weights are loaded."
            )
    for _, tokenizer in sections_at(settings, "processor.tokenizer"):
        if tokenizer.get("unk_token") == "<unk>" and tokenizer.get("type") == "TelechatTokenizer":
            del tokenizer["unk_token"]
            yield "processor.tokenizer.unk_token has no effect: TeleChat2's vocabulary calls it <_unk>."
    if settings.get("run_mode") == "predict" and (unused := [n for n in _TRAINING_ONLY if n in settings]):
        yield f"{', '.join(unused)} have no effect in a prediction: they are of training."


def _dead_model_keys(settings: Settings) -> Iterator[tuple[str, bool]]:
    """Keys of ``model_config`` that never had an effect: what is to be said, and whether it is a problem."""
    for _, model in sections_at(settings, MODEL):
        for key in [key for key in model if key in DEAD_KEYS]:
            reason, harmless = DEAD_KEYS[key]
            value = model.pop(key)
            if harmless is None or value in harmless:
                yield _without_effect(MODEL, key, reason), False
            else:
                yield f"{MODEL}.{key} is {value!r}, but {reason}. Remove it, if that is your model.", True


def _stop_step(settings: Settings) -> Iterator[str]:
    for place, runner in sections_at(settings, "runner_config"):
        if step := runner.pop("stop_step", None):
            yield (
                f"{place}.stop_step is {step!r}, and MindFormers 1.9 stops nothing by it; write {{type: "
                f"TrainCallBack, stop_step: {step}}} into callbacks, or give --runner_config.epochs."
            )


def _to_change(settings: Settings) -> Iterator[str]:
    for _, context in sections_at(settings, "context"):
        if "deterministic" in context:
            value = context.pop("deterministic")
            if str(value).upper() in ("ON", "TRUE"):
                yield (
                    f"context.deterministic is {value!r}, which MindFormers 1.9 does not read; write "
                    "train_precision_sync: True (infer_precision_sync for predictions) at the top instead."
                )
    for _, model in sections_at(settings, MODEL):
        if model.get("pet_config"):
            kind = model.pop("pet_config")
            kind = kind.get("pet_type", "adapters") if isinstance(kind, dict) else kind
            yield (
                f"{MODEL}.pet_config asks for {kind}, but adapters such as LoRA are not in this version; "
                "remove pet_config to train all weights."
            )
        if model.get("moe_config") is not None:
            model.pop("moe_config")
            yield (
                f"moe_config stands in {MODEL}, where MindFormers' Trainer replaces it, by that of a dense "
                "model if there is no other; move it to the top of the YAML, as a section of its own."
            )
    if folder := settings.pop("pretrained_model_dir", None):
        yield (
            f"pretrained_model_dir is {folder!r}, whose config.json MindFormers would mix into model_config; "
            f"write load_checkpoint: {folder!r} instead, which takes the folder as it is."
        )
    if settings.get("use_legacy") is False:
        yield "use_legacy is False, but TeleChat2 here needs True; write use_legacy: True, or remove it."


def missing_files(settings: Settings) -> Iterator[str]:
    """Files beside a YAML that its release does not have, or that were not copied along."""
    for place, ascend in sections_at(settings, "context.ascend_config"):
        path = ascend.get("parallel_speed_up_json_path")
        if isinstance(path, str) and path and not Path(path).expanduser().is_file():
            yield (
                f"{place}.parallel_speed_up_json_path names {path}, but there is no such file here; remove "
                "the line (MindFormers' release has no such file either), or copy the file."
            )
