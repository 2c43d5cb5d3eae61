"""Where MindFormers 1.9 loads weights, and how a loader of ours takes that place; a part of compat.

Its Trainer has two loaders, by the YAML: ``load_hf_checkpoint`` and ``load_checkpoint`` for the section
``checkpoint:``, ``transform_and_load_checkpoint`` for all else. Neither can read what our reader can, nor
tells more than a line of the log of names that it does not find.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import mindspore as ms
from mindformers import model_runner
from mindformers.checkpoint.utils import compile_model
from mindformers.trainer import base_trainer
from mindspore import nn

Loader = Callable[[nn.Cell, Mapping[str, tuple]], None]


@contextmanager
def loading_with(load: Loader) -> Iterator[None]:
    """Have the Trainer fill its network by ``load(network, layouts)``, in all tasks.

    ``layouts`` are MindSpore's, by the names of the parameters that this rank has a slice of; empty where
    every process has whole parameters. The network is compiled before, if they are not.
    """
    compiled = []

    def compile_and_remember(model, *args, **kwargs):
        compile_model(model, *args, **kwargs)
        compiled.append(model)

    def of_the_section(pretrained_model_dir, network, **_):
        load(network, _layouts(compiled[-1] if compiled else None))

    def of_all_else(config, model, network, dataset, optimizer=None, do_eval=False, do_predict=False):
        if config.only_save_strategy:
            before["transform_and_load_checkpoint"](
                config, model, network, dataset, optimizer, do_eval, do_predict
            )
        if do_eval or do_predict:
            network.set_train(False)
        if config.use_parallel and not hasattr(network, "load_weights"):
            compile_and_remember(
                model=model, dataset=dataset, mode=config.context.mode,
                sink_mode=config.runner_config.sink_mode, epoch=config.runner_config.epochs,
                sink_size=config.runner_config.sink_size, do_eval=do_eval, do_predict=do_predict,
            )  # fmt: skip
        of_the_section(config.checkpoint.load_path, network)

    ours = {
        "compile_model": compile_and_remember,
        "is_hf_checkpoint": lambda path: True,
        "load_hf_checkpoint": of_the_section,
        "get_load_path_after_hf_convert": lambda config, network: config.checkpoint.load_path,
        "transform_and_load_checkpoint": of_all_else,
    }
    before = {name: getattr(base_trainer, name) for name in ours}
    try:
        for name, function in ours.items():
            setattr(base_trainer, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(base_trainer, name, function)


def _layouts(model) -> Mapping[str, tuple]:
    """The layouts of what was compiled last."""
    if model is None:
        return {}
    networks = (model.train_network, model.predict_network)
    return next((network.parameter_layout_dict for network in networks if network.parameter_layout_dict), {})


def place_in_group(group: str) -> tuple[int, int]:
    """This process's number within a communication group, and the group's size."""
    return ms.communication.get_rank(group), ms.communication.get_group_size(group)


def rank_in_cluster() -> int:
    """This process's number among all, 0 where it is alone."""
    return ms.communication.get_rank() if ms.communication.GlobalComm.INITED else 0


_load_by_library = model_runner.transform_and_load_checkpoint


def _load_by_model(config, model, network, *args, **kwargs):
    """Load for ModelRunner (MindIE): through ``network.load_weights(path)`` if the model has it.

    MindFormers' own loader leaves parameters random whose names it does not find, and cuts weights only by
    strategies of another model.
    """
    if hasattr(network, "load_weights"):
        return network.load_weights(config.checkpoint.load_path)
    return _load_by_library(config, model, network, *args, **kwargs)
