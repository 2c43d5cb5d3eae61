"""Where the run of a command steps into MindFormers 1.9's Trainer; afterwards the Trainer is as it was.

Its two loaders, by the YAML ``load_hf_checkpoint`` and ``load_checkpoint`` for the section ``checkpoint:``
and ``transform_and_load_checkpoint`` for all else, cannot read what our reader can, nor tell more than a line
of the log of names that they do not find. Its data set of an evaluation repeats records. Its callbacks and
its training step lack what the classes of ours with the same names add.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pprint import pprint
from typing import TextIO

import mindspore as ms
from mindformers.checkpoint.utils import compile_model
from mindformers.dataset import CausalLanguageModelDataset
from mindformers.tools.register.register import MindFormerRegister
from mindformers.trainer import base_trainer
from mindformers.trainer import trainer as trainer_file
from mindformers.trainer.base_trainer import BaseTrainer
from mindformers.trainer.causal_language_modeling import causal_language_modeling
from mindspore import nn

Loader = Callable[[nn.Cell, Mapping[str, tuple]], None]


@dataclass(frozen=True)
class TrainerHooks:
    """What a run does in the Trainer's place.

    Attributes:
        load: fills the network by ``load(network, layouts)``, in all tasks; None: MindFormers' loaders do.
            ``layouts`` are MindSpore's, by the names of the parameters that this rank has a slice of; empty
            where every process has whole parameters. The network is compiled before, if they are not.
        evaluation_data: ``evaluation_data(config, shard)`` makes the data set of an evaluation, or returns
            None, and MindFormers does. ``shard``: this process's number, and how many there are.
        opened: called with MindFormers' config when it has opened the data of a training.
        classes: (kind, class of ours) that take the place of MindFormers' class of that name.
        configs: where the Trainer prints its whole config; None: the standard output.
    """

    load: Loader | None = None
    evaluation_data: Callable | None = None
    opened: Callable | None = None
    classes: tuple[tuple[str, type], ...] = field(default=())
    configs: TextIO | None = None


@contextmanager
def run_by(hooks: TrainerHooks) -> Iterator[None]:
    """Have the Trainer call ``hooks`` inside."""
    functions = {"pprint": partial(pprint, stream=hooks.configs)}
    with ExitStack() as stack:
        stack.enter_context(_exchanged(causal_language_modeling, functions))
        functions = functions | (_loaders(hooks.load) if hooks.load else {})
        functions |= {"check_runner_config": _runner_check(hooks.opened)} if hooks.opened else {}
        stack.enter_context(_exchanged(base_trainer, functions))
        if hooks.load:  # it looks for safetensors in the path, and our reader reads others, too
            stack.enter_context(_exchanged(trainer_file, {"get_checkpoint_path": lambda path: path}))
        if hooks.evaluation_data:
            create = {"create_dataset": _create_dataset(hooks.evaluation_data)}
            stack.enter_context(_exchanged(BaseTrainer, create))
        for kind, own in hooks.classes:
            before = MindFormerRegister.get_cls(kind, own.__name__)
            stack.callback(MindFormerRegister.register_cls, before, kind)
            MindFormerRegister.register_cls(own, kind)
        yield


@contextmanager
def _exchanged(owner: object, functions: Mapping[str, Callable]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(owner, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def _loaders(load: Loader) -> dict[str, Callable]:
    """The functions of base_trainer by which it loads, replaced by ``load``."""
    compiled = []
    load_by_library = base_trainer.transform_and_load_checkpoint

    def compile_and_remember(model, *args, **kwargs):
        compile_model(model, *args, **kwargs)
        compiled.append(model)

    def of_the_section(pretrained_model_dir, network, **_):
        load(network, _layouts(compiled[-1]) if compiled else {})

    def of_all_else(config, model, network, dataset, optimizer=None, do_eval=False, do_predict=False):
        if config.only_save_strategy:
            load_by_library(config, model, network, dataset, optimizer, do_eval, do_predict)
        if do_eval or do_predict:
            network.set_train(False)
        if config.use_parallel and not hasattr(network, "load_weights"):
            compile_and_remember(
                model=model, dataset=dataset, mode=config.context.mode,
                sink_mode=config.runner_config.sink_mode, epoch=config.runner_config.epochs,
                sink_size=config.runner_config.sink_size, do_eval=do_eval, do_predict=do_predict,
            )  # fmt: skip
        of_the_section(config.checkpoint.load_path, network)

    return {
        "compile_model": compile_and_remember,
        "is_hf_checkpoint": lambda path: True,
        "load_hf_checkpoint": of_the_section,
        "get_load_path_after_hf_convert": lambda config, network: config.checkpoint.load_path,
        "transform_and_load_checkpoint": of_all_else,
    }


def _layouts(model: ms.Model) -> Mapping[str, tuple]:
    """The layouts of a compiled model's parameters."""
    networks = (model.train_network, model.predict_network)
    return next((network.parameter_layout_dict for network in networks if network.parameter_layout_dict), {})


def _runner_check(opened: Callable) -> Callable:
    check = base_trainer.check_runner_config

    def checked(config, dataset):
        check(config, dataset)
        opened(config)

    return checked


def _create_dataset(create: Callable) -> Callable:
    """BaseTrainer's method; batch size and share of a process stay those of MindFormers."""
    create_by_library = BaseTrainer.create_dataset

    def create_dataset(trainer, is_train=True, default_args=None):
        if not is_train and trainer.eval_dataset is None:
            CausalLanguageModelDataset.init_dataset_config(trainer.config.eval_dataset)
            number, shards = CausalLanguageModelDataset._generate_shard_info()  # noqa: SLF001
            if (data := create(trainer.config, (number or 0, shards or 1))) is not None:
                return data
        return create_by_library(trainer, is_train, default_args)

    return create_dataset
