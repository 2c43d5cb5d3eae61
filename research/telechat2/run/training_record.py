"""What a training was, kept beside each of its checkpoints: ``training.json``.

A checkpoint says how many steps were done. Which records those were depends on the data, the batch, the seed
and the order; without them a resumed run would skip records or repeat them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write, read_json
from research.telechat2.config.fields import defaults_of
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.sections import section_of
from research.telechat2.run.processes import device_num, on_cpu
from research.telechat2.run.records import fingerprint
from research.telechat2.run.steps import global_batch_size, steps_per_epoch

NAME = "training.json"
# of model_config: of prediction, of a plan, or told by others and by the weights
_NOT_TRAINED = (
    "batch_size", "use_past", "qkv_concat", "is_dynamic", "block_size", "num_blocks", "prefill_chunk",
    "top_k", "top_p", "do_sample", "temperature", "repetition_penalty", "max_decode_length", "offset",
    "checkpoint_name_or_path", "pp_interleave_num", "fine_grain_interleave", "disable_lazy_inline",
    "calculate_per_token_loss", "bos_token_id", "eos_token_id", "sigma", "mean", "max_position_embedding",
    "base_seqlen", "training_seqlen", "n_kv_heads", "intermediate_size",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingRecord:
    """The facts that decide which records a step trains on, and by which learning rate.

    Attributes:
        step: steps done.
        steps_per_epoch: of a pass over the data; None: not known before MindSpore has opened the data.
        records: that a pass over the data reads; None: not counted.
        data: a hash of the data; None: not read.
        global_batch_size: records of a step, of all devices together.
        devices: processes.
        epochs: passes over the data.
        sink_size: steps of a sink; 0: without sink mode.
        seed, shuffle: of the order of the records.
        lr_schedule, optimizer: their sections of the YAML.
        others: other settings that change the numbers of a step, by their dotted names; None: not recorded,
            by an earlier version.
    """

    step: int
    steps_per_epoch: int | None
    records: int | None
    data: str | None
    global_batch_size: int
    devices: int
    epochs: int
    sink_size: int
    seed: int | None
    shuffle: object
    lr_schedule: dict
    optimizer: dict
    others: dict | None = None

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; in sink mode MindFormers drops a last sink that is not full."""
        if self.steps_per_epoch is None:
            return None
        steps = self.steps_per_epoch * self.epochs
        return steps - steps % self.sink_size if self.sink_size else steps

    def at(self, step: int) -> "TrainingRecord":
        """This training after ``step`` steps."""
        return replace(self, step=step)

    def write(self, folder: Path) -> None:
        """Write ``folder/training.json``, whole or not at all."""
        with atomic_write(folder / NAME) as temporary:
            text = json.dumps(asdict(self), ensure_ascii=False, indent=2, default=str)
            temporary.write_text(text, encoding="utf-8")


def read_record(folder: Path) -> TrainingRecord | None:
    """The record beside a checkpoint; None where an earlier version or another program saved."""
    found = read_json(folder / NAME)
    if found is None:
        return None
    names = [field.name for field in fields(TrainingRecord) if field.name != "others"]
    if missing := [name for name in names if name not in found]:
        raise UsageError(
            f"{folder / NAME} lacks {', '.join(missing)}; copy the checkpoint again, or delete this file, so "
            "that the data is not compared."
        )
    return TrainingRecord(**{name: found[name] for name in names}, others=found.get("others"))


def describe_training(config: dict, files: Mapping[Path, int | None]) -> TrainingRecord:
    """The record of a run that is about to start, at step 0.

    Args:
        files: of ``train_dataset``, see ``check_dataset``; empty: a loader of which nothing is known.
    """
    runner = config.get("runner_config") or {}
    loader = section_of(config, "train_dataset.data_loader")
    records = None
    if files and None not in files.values():
        records = sum(files.values())
        records = min(records, loader.get("num_samples") or records)
    sinks = runner.get("sink_mode", True) and not on_cpu(config)
    sink_size = (runner.get("sink_size") or 1) if sinks else 0
    devices = device_num() if config.get("use_parallel") else 1
    batch = global_batch_size(config, devices)
    steps = steps_per_epoch(config, records, batch, devices) if records is not None else None
    return TrainingRecord(
        step=0,
        steps_per_epoch=steps,
        records=records,
        data=fingerprint(files) if files else None,
        global_batch_size=batch,
        devices=devices,
        epochs=runner.get("epochs") or 1,
        sink_size=(steps or 1) if sink_size == -1 else sink_size,
        seed=config.get("seed", 0),
        shuffle=loader.get("shuffle"),
        lr_schedule=dict(config.get("lr_schedule") or {}),
        optimizer=dict(config.get("optimizer") or {}),
        others=_others(config),
    )


def _others(config: dict) -> dict:
    """Settings beside schedule and optimizer by which a step gives other numbers, with their defaults."""
    model = defaults_of(ModelSettings)
    model |= {key: value for key, value in section_of(config, "model.model_config").items() if key in model}
    wrapper = section_of(config, "runner_wrapper")
    found = {f"model_config.{key}": value for key, value in model.items() if key not in _NOT_TRAINED}
    named = wrapper.keys() - {"type", "auto_register"}
    found |= {f"runner_wrapper.{key}": wrapper[key] for key in sorted(named)}
    found |= {f"moe_config.{key}": value for key, value in section_of(config, "moe_config").items()}
    return found | {"train_dataset.input_columns": section_of(config, "train_dataset").get("input_columns")}
