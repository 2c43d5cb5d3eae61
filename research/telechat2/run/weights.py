"""Loading by our own reader in a task of MindFormers: a checkpoint of any layout, without a conversion."""

import re
from collections.abc import Mapping
from logging import LogRecord
from pathlib import Path

from research.telechat2.checkpoint.loading import NO_WEIGHTS


def hush_loaders() -> None:
    """Filter the warnings of MindSpore and MindFormers, from now on; after ``set_output_path``."""
    from mindspore.log import _get_logger

    from research.telechat2.compat.library import get_logger

    for logger in (_get_logger(), get_logger()):
        logger.addFilter(is_worth_saying)


def is_worth_saying(record: LogRecord) -> bool:
    """Whether a message is anything but a complaint that parameters of ``NO_WEIGHTS`` are not loaded."""
    message = record.getMessage()
    if "parameters in the 'net' are not loaded" in message:
        return False  # only their number: the next message names them
    found = re.fullmatch(
        r"No source parameters found for dst_param: (.+), skipping|\[(.*)\] are not loaded\.", message
    )
    if not found:
        return True
    names = [name.strip(" '") for name in (found[1] or found[2]).split(",")]
    return not all(name.endswith(NO_WEIGHTS) for name in names)


def load_network(source: Path, network, layouts: Mapping[str, tuple]) -> None:
    """Fill the network of a task from ``source``; every process reads what it stores, and no more.

    A network that has ``load_weights``, as the parallel inference model, does that by itself.

    Args:
        source: an HF folder of a TeleChat model, or what else ``whole_weights`` reads.
        network: the model, perhaps wrapped; compiled, if ``layouts`` are not empty.
        layouts: MindSpore's, of the parameters that this process has slices of.

    Raises:
        UsageError: the checkpoint is broken, or its names or shapes are not the network's.
    """
    if hasattr(network, "load_weights"):
        network.load_weights(source)
        print(f"load_checkpoint: loaded this rank's part of {source}", flush=True)
        return
    from research.telechat2.checkpoint.layouts.read import whole_weights
    from research.telechat2.checkpoint.loading import load_slices, load_tensors, sizes_of_model
    from research.telechat2.compat.loading import place_in_group, rank_in_cluster
    from research.telechat2.telechat_config import TelechatConfig

    configs = (getattr(cell, "config", None) for _, cell in network.cells_and_names())
    config = next(config for config in configs if isinstance(config, TelechatConfig))
    _, whole = whole_weights(source, sizes_of_model(config))
    if layouts:
        load_slices(network, whole, layouts, rank_in_cluster(), place_in_group, str(source))
    else:
        load_tensors(network, whole, str(source))
    print(f"load_checkpoint: loaded {len(whole):,} tensors from {source}", flush=True)
