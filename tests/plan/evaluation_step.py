"""The network that evaluates a YAML, built by MindFormers' Trainer; imported by the compiling process."""

from research.telechat2.config.evaluation import prepare_evaluation
from research.telechat2.run.training_step import build_network, records


def build(settings: dict, in_training: bool = False):
    """The network, and its input of the batch of all ranks; as training_step.build.

    ``in_training``: as ``do_eval`` evaluates between two steps, otherwise as ``run_mode: eval``.
    """
    batch_size = settings["runner_config"].get("batch_size", 1)
    settings |= {"do_eval": True} if in_training else {"run_mode": "eval", "load_checkpoint": "given"}
    prepare_evaluation(settings, training=in_training)
    trainer, config, network = build_network(settings)
    seq_length = network.config.seq_length
    if in_training:
        network = trainer.wrap_eval_network_with_tool_cells(network)
    trainer.set_network(network, is_train=False)
    return network, records(batch_size * config.parallel_config.data_parallel, seq_length)
