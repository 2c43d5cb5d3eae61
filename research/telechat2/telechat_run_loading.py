"""Loading by our own reader in a task of MindFormers: a checkpoint of any layout, without a conversion."""

from collections.abc import Mapping
from pathlib import Path


def load_network(source: Path, network, layouts: Mapping[str, tuple]) -> None:
    """Fill the network of a task from ``source``; every process reads what it stores, and no more.

    A network that has ``load_weights``, as the parallel inference model, does that by itself.

    Args:
        source: an HF folder of a TeleChat model, or what else ``whole_weights`` reads.
        network: the model, perhaps wrapped; compiled, if ``layouts`` are not empty.
        layouts: MindSpore's, of the parameters that this process has slices of.

    Raises:
        ValueError: the checkpoint is broken, or its names or shapes are not the network's.
    """
    if hasattr(network, "load_weights"):
        network.load_weights(source)
        print(f"load_checkpoint: loaded this rank's part of {source}", flush=True)
        return
    from research.telechat2.checkpoint.loading import load_slices, load_tensors, sizes_of_model
    from research.telechat2.checkpoint.rank_layout import whole_weights
    from research.telechat2.telechat_compat_loading import place_in_group, rank_in_cluster
    from research.telechat2.telechat_config import TelechatConfig

    configs = (getattr(cell, "config", None) for _, cell in network.cells_and_names())
    config = next(config for config in configs if isinstance(config, TelechatConfig))
    _, whole = whole_weights(source, sizes_of_model(config))
    if layouts:
        load_slices(network, whole, layouts, rank_in_cluster(), place_in_group, str(source))
    else:
        load_tensors(network, whole, str(source))
    print(f"load_checkpoint: loaded {len(whole):,} tensors from {source}", flush=True)
