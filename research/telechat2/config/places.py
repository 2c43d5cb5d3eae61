"""Where a setting stands: the dotted names that a mistyped or misplaced key may mean."""

import difflib
from functools import cache

from research.telechat2.config.classes import GROUPS, OWN_KEYS, PLACES
from research.telechat2.config.fields import settings_of
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.tables import SECTIONS

# Names that other trainers have for settings of this one.
_ELSEWHERE = {
    "lr": "lr_schedule.learning_rate",
    "min_lr": "lr_schedule.lr_end",
    "num_epochs": "runner_config.epochs",
    "num_train_epochs": "runner_config.epochs",
    "bs": "runner_config.batch_size",
    "micro_batch_size": "runner_config.batch_size",
    "per_device_train_batch_size": "runner_config.batch_size",
    "save_steps": "checkpoint.save_interleaved_steps",
    "save_interval": "checkpoint.save_interleaved_steps",
    "save_total_limit": "checkpoint.save_max",
    "resume": "resume_training",
    "resume_from_checkpoint": "resume_training",
    "max_new_tokens": "model.model_config.max_decode_length",
    "max_length": "model.model_config.max_decode_length",
    "num_hidden_layers": "model.model_config.num_layers",
    "data_path": "train_dataset_dir",
    "config_file": "config",
}
# Sections by how often people write settings of theirs on a command line; others come after them.
_FIRST = (
    "", "runner_config", "lr_schedule", "optimizer", "runner_wrapper", "checkpoint", "model.model_config",
    "parallel_config", "parallel", "train_dataset.data_loader", "train_dataset", "context",
)  # fmt: skip


def elsewhere(key: str) -> str | None:
    """The setting whose name in other trainers is ``key``."""
    return _ELSEWHERE.get(key)


def is_setting(key: str) -> bool:
    """Whether a dotted name is that of a setting."""
    return key in _places().get(key.rpartition(".")[2], [])


def settings_like(key: str) -> list[str]:
    """The dotted names that ``key``, itself dotted or not, may stand for: the likeliest first, at most three.

    The same last name in another section comes before names that are only alike.
    """
    name = key.replace("-", "_").lower()
    last = name.rpartition(".")[2]
    places = _places()
    if last in _ELSEWHERE:
        return [_ELSEWHERE[last]]
    if last in places and (found := [path for path in places[last] if path != key]):
        return found[:1]
    close = difflib.get_close_matches(last, places, n=3, cutoff=0.75)
    return [path for name in close for path in places[name][:1] if path != key]


@cache
def _places() -> dict[str, list[str]]:
    """The last names of all settings, each with its dotted names."""
    keys = {path: list(known) for path, known in SECTIONS.items() if not path.endswith("_config.data_loader")}
    for path, group in PLACES.items():
        if "[]" not in path and path != "model.model_config":
            classes = [known for known in GROUPS[group].values() if known]
            keys[path] = sorted({*keys.get(path, ()), *(key for known in classes for key in known)})
    keys["model.model_config"] = list(settings_of(ModelSettings))
    found: dict[str, list[str]] = {}
    for path in sorted(keys, key=lambda path: _FIRST.index(path) if path in _FIRST else len(_FIRST)):
        if "_task" in path or path.startswith("grouped"):
            continue
        for key in keys[path]:
            if key not in OWN_KEYS:
                found.setdefault(key, []).append(f"{path}.{key}".lstrip("."))
    return found
