"""Iterations as MindFormers saves them, of one small matrix: real files, written without MindSpore."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from research.telechat2.run.training_record import TrainingRecord

RECORD = TrainingRecord(
    step=0, steps_per_epoch=5, records=5, data="a" * 64, global_batch_size=1, devices=1, epochs=3,
    sink_size=0, seed=0, shuffle=True, lr_schedule={"learning_rate": 1e-3, "total_steps": -1},
    optimizer={"eps": 1e-8},
)  # fmt: skip


def save_iteration(folder: Path, step: int, record: TrainingRecord | None = RECORD, **common) -> Path:
    """``folder/iteration_<step>`` with weights, optimizer, common.json and record, and the tracker."""
    iteration = folder / f"iteration_{step:08d}"
    iteration.mkdir(parents=True)
    weight = np.zeros((2, 3), np.float32)
    save_file({"w": weight}, iteration / "t-model-0000000-0000001.safetensors")
    states = {"adam_m.w": weight, "adam_v.w": weight, "global_step": np.array([step], np.int32)}
    save_file(states, iteration / "t-opt-0000000-0000001.safetensors")
    numbers = {"epoch_num": -(-step // 5), "step_num": step, "global_step": step, "global_batch_size": 1}
    (iteration / "common.json").write_text(json.dumps(numbers | common))
    if record is not None:
        record.at(step).write(iteration)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    return iteration
