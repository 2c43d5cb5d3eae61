"""Whether a training fits into a CPU's memory, and its checkpoints onto the disk."""

import shutil
from pathlib import Path

from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError
from research.telechat2.common.memory import check_host_memory
from research.telechat2.config.settings import DEFAULTS, model_config
from research.telechat2.config.sharing import memory_of_rank, rotary_bytes
from research.telechat2.run.save_checkpoint import monitors

_GRADIENT_BYTES, _MOMENTS_BYTES = 4, 8  # of a parameter: float32, two of AdamW


def check_training_memory(config: dict, processes: int) -> None:
    """Refuse a model whose weights, gradients and moments alone are more than this machine has.

    Args:
        config: the settings of a training on CPUs, with a TelechatConfig.
        processes: copies of the model on this machine.
    """
    settings = model_config(config, DEFAULTS["parallel_config"])
    settings.use_past = False
    weights = memory_of_rank(settings, 1)[0]
    parameters = weights / (2 if "16" in str(settings.param_init_type) else 4)
    parts = {
        "weights": weights,
        "gradients": parameters * _GRADIENT_BYTES,
        "moments": parameters * _MOMENTS_BYTES,
        "rotary tables": rotary_bytes(settings),
    }
    needed = {name: processes * size for name, size in parts.items()}
    check_host_memory(needed, "seq_length or the model's sizes")


def checkpoint_bytes(parameters: int, config: dict) -> int:
    """Bytes of a checkpoint of a whole model: weights, and the optimizer's moments where they are saved."""
    model = (config.get("model") or {}).get("model_config") or {}
    section = config.get("checkpoint")
    moments = section is None or not section.get("no_save_optim", True)
    item = WIDTH.get(str(model.get("param_init_type", "float32")).lower(), 4)
    return parameters * (item + (_MOMENTS_BYTES if moments else 0))


def kept_checkpoints(config: dict, steps: int | None) -> int:
    """Checkpoints that lie on the disk at once: the oldest is removed after the newest is saved."""
    section = config.get("checkpoint")
    if section is None:
        if not (found := monitors(config)):
            return 0
        every, most = found[0].get("save_checkpoint_steps", 1), found[0].get("keep_checkpoint_max", 5)
    else:
        every, most = section.get("save_interleaved_steps", 1), section.get("save_max", 5)
    saved = -(-steps // every) if steps and every else most + 1
    return min(saved, most + 1)


def check_space(folder: Path, each: int, count: int) -> str | None:
    """Compare what checkpoints of ``each`` bytes need with what the disk of ``folder`` has.

    Returns:
        A warning where not all ``count`` of them fit; None if they do.

    Raises:
        UsageError: not even one fits.
    """
    if not count:
        return None
    free = free_bytes(folder)
    if free < each:
        raise UsageError(
            f"{folder} has {gigabytes(free)} free, but a checkpoint needs about {gigabytes(each)}. Make "
            "room, or give another --output_dir."
        )
    if free < each * count:
        return (
            f"{folder} has {gigabytes(free)} free, and {count} checkpoints of about {gigabytes(each)} need "
            f"{gigabytes(each * count)}. Make room, or keep fewer (--checkpoint.save_max)."
        )
    return None


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written into a folder, which need not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,} bytes"
