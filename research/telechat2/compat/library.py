"""What the code takes from MindFormers, so that a move to another release is a change of one package.

Importing this file changes nothing of MindFormers; ``install`` and ``run_by`` of this package do.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
from mindformers import MindFormerConfig, Trainer
from mindformers.checkpoint.checkpoint import CommonInfo
from mindformers.core.callback import CheckpointMonitor as LibraryCheckpointMonitor
from mindformers.core.callback import MFLossMonitor
from mindformers.core.context import build_context
from mindformers.core.loss.loss import CrossEntropyLoss
from mindformers.generation.generation_config import GenerationConfig
from mindformers.generation.text_generator import get_valid_length_each_example
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.tokenization_utils import PreTrainedTokenizer
from mindformers.models.tokenization_utils_base import AddedToken
from mindformers.modules.transformer.moe import MoEConfig as _MoEConfig
from mindformers.modules.transformer.op_parallel_config import OpParallelConfig
from mindformers.modules.transformer.transformer import (
    TransformerOpParallelConfig,
    default_transformer_config,
)
from mindformers.tools.logger import get_logger
from mindformers.tools.logger import logger as library_logger
from mindformers.tools.register.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.register.template import ConfigTemplate
from mindformers.tools.utils import (
    check_in_modelarts,
    get_output_root_path,
    get_output_subpath,
    get_predict_run_mode,
    get_real_group_size,
    get_real_rank,
    is_main_rank,
)
from mindformers.trainer import CausalLanguageModelingTrainer
from mindformers.utils.file_utils import set_output_path
from mindformers.utils.tensorboard import get_tensorboard_writer
from mindformers.wrapper.wrapper import MFTrainOneStepCell as LibraryTrainOneStepCell
from mindspore.train.callback import Callback

from research.telechat2.common.errors import UsageError


class _ToStandardError(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is when a message comes: a run changes it."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value):
        pass


# The plugin's own warnings, on standard error whatever becomes of MindFormers' notes.
logger = logging.getLogger("telechat2")
if not logger.handlers:
    logger.addHandler(_ToStandardError())
    logger.handlers[0].setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def is_cpu() -> bool:
    """Whether graphs are built for the CPU target."""
    return ms.get_context("device_target") == "CPU"


def process_group() -> tuple[int, int, str]:
    """How many processes run, which of them this is, and their group's name; without any group 1, 0, ""."""
    group = ms.communication.GlobalComm
    if not group.INITED:
        return 1, 0, ""
    return ms.communication.get_group_size(), ms.communication.get_rank(), group.WORLD_COMM_GROUP


def place_in_group(group: str) -> tuple[int, int]:
    """This process's number within a communication group, and the group's size."""
    return ms.communication.get_rank(group), ms.communication.get_group_size(group)


def pipeline_place() -> tuple[int, int]:
    """The stage of this process, and the number of stages."""
    stages = ms.get_auto_parallel_context("pipeline_stages")
    return get_real_rank() // max(1, get_real_group_size() // stages), stages


def loss_rank() -> int:
    """The process that reports the loss: the first, or of a pipeline one of the stage that computes it."""
    if pipeline_place()[1] == 1 or ms.get_auto_parallel_context("pipeline_scheduler") == "zero_bubble_v":
        return 0
    return get_real_group_size() - 1


def loss_monitor(run_params):
    """MindFormers' MFLossMonitor among the callbacks of a run (MindSpore's parameters of it), or None."""
    callbacks = getattr(run_params, "list_callback", None) or []
    return next((callback for callback in callbacks if isinstance(callback, MFLossMonitor)), None)


def mean_over_parts(run_params, loss: float) -> float:
    """The loss of a step as MFLossMonitor reports it: micro-batches may arrive as their sum."""
    monitor = loss_monitor(run_params)
    return loss if monitor is None else float(monitor._fix_loss_for_parallel(loss, print_warning=False))


def join_processes() -> None:
    """Meet the other processes that msrun has started; its scheduler, which runs the command too, ends here.

    Raises:
        UsageError: they do not come together.
    """
    try:
        ms.communication.init()
    except RuntimeError as error:
        if os.environ.get("MS_ROLE") == "MS_SCHED":
            raise SystemExit(1) from None  # a worker has failed, and says why
        raise UsageError(
            "the processes of this run did not meet: "
            f"{str(error).strip().splitlines()[0]} Look into the other logs beside this one."
        ) from error


def is_predict_run() -> bool:
    """Whether MindFormers was started to predict: it says so in the environment, not in the config."""
    return get_predict_run_mode()


@contextmanager
def naming_target(target: str) -> Iterator[None]:
    """Turn MindSpore's failure to set up a device target into a UsageError; around the set-up alone."""
    try:
        yield
    except RuntimeError as error:
        raise UsageError(
            f"context.device_target is {target}, but MindSpore cannot use it here: "
            f"{str(error).strip().splitlines()[0]} Use a YAML for CPUs, or a machine with NPUs."
        ) from error


@contextmanager
def naming_data() -> Iterator[None]:
    """Turn MindSpore's failures to read a data set into a UsageError; others pass as they are."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        if "MindDataset" not in text and "dataset pipeline" not in text:
            raise
        reasons = [line for line in text.splitlines() if "ERROR" in line] or text.splitlines()
        raise UsageError(
            f"the data set cannot be read: {reasons[0]} Copy its .mindrecord and .db files again, or prepare "
            f"the data again."
        ) from error


def output_directory() -> str:
    """The run's ``output_dir``."""
    return get_output_root_path()


def parallel_config_from(value) -> TransformerOpParallelConfig:
    """A YAML's ``parallel_config`` section, or the object MindFormers made of it, as that object.

    Raises:
        UsageError: MindFormers refuses a key or value.
    """
    if isinstance(value, TransformerOpParallelConfig):
        return value
    try:
        return TransformerOpParallelConfig(**dict(value))
    except (TypeError, ValueError) as error:
        raise UsageError(f"parallel_config is refused by MindFormers: {error}. Correct that key.") from error


class MoEConfig(_MoEConfig):
    """MindFormers' ``moe_config`` section with its ``ep_extend_tp``, which MindFormers checks and forgets.

    Raises:
        UsageError: for a key or value that MindFormers refuses, and for loss factors without types, which it
            drops.
    """

    def __init__(self, *args, ep_extend_tp: bool = True, **kwargs):
        if kwargs.get("aux_loss_factors") and not kwargs.get("aux_loss_types"):
            raise UsageError(
                f"moe_config.aux_loss_factors is {kwargs['aux_loss_factors']} without aux_loss_types, which "
                "MindFormers takes for no loss at all; add aux_loss_types: ['expert'], or remove the factors."
            )
        try:
            super().__init__(*args, ep_extend_tp=ep_extend_tp, **kwargs)
        except (TypeError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise UsageError(f"moe_config is refused by MindFormers: {reason}. Correct that key.") from error
        self.ep_extend_tp = ep_extend_tp


def mindformers_config(settings: dict) -> MindFormerConfig:
    """The config that the Trainer takes: ``settings``, completed in place by MindFormers' defaults."""
    ConfigTemplate.apply_template(settings)
    config = MindFormerConfig(**settings)
    if config.moe_config:
        config.moe_config = moe_config_from(config.moe_config)  # the Trainer keeps such an object
    return config


def moe_config_from(value) -> _MoEConfig:
    """A YAML's ``moe_config`` section, MindFormers' object of it, or None, as that object."""
    if isinstance(value, _MoEConfig):
        return value
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"moe_config is {value!r}; expected a section of settings.")
    return MoEConfig(**dict(value or {}))
