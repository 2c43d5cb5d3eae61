"""The step that a run would train with, built by MindFormers' own Trainer; for the dry run."""

import os
from pathlib import Path

import mindspore as ms
import numpy as np

from research.telechat2.compat.environment import prepare_environment
from research.telechat2.config.yaml_files import CHECKOUT, SHIPPED


def build(settings: dict):
    """The wrapped training step, and its input of the global batch ``[B, seq_length + 1]``, ids and labels.

    MindFormers sets MindSpore's context and makes model, pipeline, optimizer and step of the YAML, as in a
    run; left out are data, weights and callbacks. The strategy file is ``strategy.ckpt`` in the current
    directory.

    Args:
        settings: the YAML.
    """
    trainer, config, network = build_network(settings)
    seq_length = network.config.seq_length
    network = trainer.wrap_network_with_tool_cells(network)
    trainer.set_network(network, is_train=True)
    optimizer = trainer.create_optimizer_scheduler(network, set())
    step = trainer.create_model_wrapper(network, optimizer)
    return step.set_train(True), records(config.runner_config.global_batch_size, seq_length)


def build_network(settings: dict):
    """MindFormers' Trainer, its config and the network of the YAML, in MindSpore's context."""
    here = Path.cwd()
    os.environ["OM_MODULES_CACHE"] = str(here / "modules")
    prepare_environment(str(here / "output"), CHECKOUT / SHIPPED)
    import research.telechat2.run.registered  # noqa: F401 registers the classes that YAMLs name
    from research.telechat2.compat.library import (
        CausalLanguageModelingTrainer,
        build_context,
        mindformers_config,
        set_output_path,
    )

    config = mindformers_config(settings)
    set_output_path(str(here / "output"))
    build_context(config)
    ms.set_auto_parallel_context(strategy_ckpt_save_file=str(here / "strategy.ckpt"))
    trainer = CausalLanguageModelingTrainer(model_name=config.trainer.model_name)
    trainer.set_train_dataset(_Steps())
    config = trainer.set_config(config, is_full_config=True)
    network = trainer.create_network(
        default_args={
            "parallel_config": config.parallel_config,
            "moe_config": config.moe_config,
            "dataset_config": config.train_dataset,
            "calculate_per_token_loss": config.get("calculate_per_token_loss", False),
            "batch_size": config.runner_config.mini_batch_size,
        }
    )
    return trainer, config, network


def records(batch_size: int, seq_length: int) -> list[ms.Tensor]:
    """Ids and labels of a batch, all 0: int32 ``[batch_size, seq_length + 1]`` each."""
    ids = ms.Tensor(np.zeros((batch_size, seq_length + 1)), ms.int32)
    return [ids, ids]


class _Steps:
    """All that the learning rate's schedule asks of a data set."""

    def get_dataset_size(self) -> int:
        """Steps of an epoch."""
        return 1
