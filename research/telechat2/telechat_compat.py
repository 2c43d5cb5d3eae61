"""The one file that knows which MindFormers this is, and what its Trainer needs to run on a CPU.

Everything the model takes from MindFormers comes through here, so that a move to another release is a
change of one file. The workarounds for the CPU target are at the end; they change nothing on Ascend.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pprint import pprint

import mindspore as ms
import numpy as np
from mindformers import MindFormerConfig, Trainer, model_runner
from mindformers.core import parallel_config as _parallel_config
from mindformers.core.callback import MFLossMonitor
from mindformers.core.context import build_context
from mindformers.core.loss.loss import CrossEntropyLoss
from mindformers.generation.generation_config import GenerationConfig
from mindformers.generation.text_generator import get_valid_length_each_example
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.modeling_utils import PreTrainedModel as _PreTrainedModel
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
    get_predict_run_mode,
    get_real_group_size,
    get_real_rank,
    is_main_rank,
)
from mindformers.trainer import CausalLanguageModelingTrainer, base_trainer
from mindformers.trainer.causal_language_modeling import causal_language_modeling
from mindformers.utils.file_utils import set_output_path
from mindformers.utils.tensorboard import get_tensorboard_writer
from mindformers.wrapper.wrapper import MFTrainOneStepCell as _MFTrainOneStepCell
from mindspore import Tensor, nn, ops
from mindspore.train.callback import Callback

from research.telechat2.compat.pipeline import read_as_rows
from research.telechat2.config.optimization import check_seed
from research.telechat2.generation.padding import Rows, check_ids, pad_rows
from research.telechat2.generation.sampling import Sampling, check_finite, next_token, row_generators
from research.telechat2.telechat_chunks import read_in_chunks
from research.telechat2.telechat_pool import check_pool
from research.telechat2.telechat_rope_requests import limits_of_rows, longest_of_rows
from research.telechat2.telechat_sampling_rules import check_spelling

__all__ = [
    "AddedToken",
    "Callback",
    "CausalLanguageModelingTrainer",
    "ConfigTemplate",
    "CrossEntropyLoss",
    "MFTrainOneStepCell",
    "MindFormerConfig",
    "MindFormerModuleType",
    "MindFormerRegister",
    "MoEConfig",
    "OpParallelConfig",
    "PreTrainedModel",
    "PreTrainedTokenizer",
    "PretrainedConfig",
    "Trainer",
    "TransformerOpParallelConfig",
    "build_context",
    "check_in_modelarts",
    "default_transformer_config",
    "find_graph_again",
    "get_logger",
    "get_real_rank",
    "get_tensorboard_writer",
    "is_cpu",
    "is_main_rank",
    "is_predict_run",
    "join_processes",
    "library_logger",
    "logger",
    "moe_config_from",
    "naming_data",
    "naming_target",
    "output_directory",
    "parallel_config_from",
    "process_group",
    "set_output_path",
]


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


def print_configs_to(stream) -> None:
    """Have MindFormers' Trainer print its whole config there, and not to ``sys.stdout``."""
    for module in (base_trainer, causal_language_modeling):
        module.pprint = partial(pprint, stream=stream)


def join_processes() -> None:
    """Meet the other processes that msrun has started; its scheduler, which runs the command too, ends here.

    Raises:
        ValueError: they do not come together.
    """
    try:
        ms.communication.init()
    except RuntimeError as error:
        if os.environ.get("MS_ROLE") == "MS_SCHED":
            raise SystemExit(1) from None  # a worker has failed, and says why
        raise ValueError(
            "the processes of this run did not meet: "
            f"{str(error).strip().splitlines()[0]} Look into the other logs beside this one."
        ) from error


def is_predict_run() -> bool:
    """Whether MindFormers was started to predict: it says so in the environment, not in the config."""
    return get_predict_run_mode()


@contextmanager
def naming_target(target: str) -> Iterator[None]:
    """Turn MindSpore's failure to set up a device target into a ValueError; around the set-up alone."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"context.device_target is {target}, but MindSpore cannot use it here: "
            f"{str(error).strip().splitlines()[0]} Use a YAML for CPUs, or a machine with NPUs."
        ) from error


@contextmanager
def naming_data() -> Iterator[None]:
    """Turn MindSpore's failures to read a data set into a ValueError; others pass as they are."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        if "MindDataset" not in text and "dataset pipeline" not in text:
            raise
        reasons = [line for line in text.splitlines() if "ERROR" in line] or text.splitlines()
        raise ValueError(
            f"the data set cannot be read: {reasons[0]} Copy its .mindrecord and .db files again, or prepare "
            f"the data again."
        ) from error


def output_directory() -> str:
    """The run's ``output_dir``."""
    return get_output_root_path()


def parallel_config_from(value) -> TransformerOpParallelConfig:
    """A YAML's ``parallel_config`` section, or the object MindFormers made of it, as that object."""
    if isinstance(value, TransformerOpParallelConfig):
        return value
    return TransformerOpParallelConfig(**dict(value))


class MoEConfig(_MoEConfig):
    """MindFormers' ``moe_config`` section with its ``ep_extend_tp``, which MindFormers checks and forgets.

    Raises:
        ValueError: for a key or value that MindFormers refuses, and for loss factors without types, which it
            drops.
    """

    def __init__(self, *args, ep_extend_tp: bool = True, **kwargs):
        if kwargs.get("aux_loss_factors") and not kwargs.get("aux_loss_types"):
            raise ValueError(
                f"moe_config.aux_loss_factors is {kwargs['aux_loss_factors']} without aux_loss_types, which "
                "MindFormers takes for no loss at all; add aux_loss_types: ['expert'], or remove the factors."
            )
        try:
            super().__init__(*args, ep_extend_tp=ep_extend_tp, **kwargs)
        except (TypeError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"moe_config is refused by MindFormers: {reason}. Correct that key.") from error
        self.ep_extend_tp = ep_extend_tp


_parallel_config.MoEConfig = MoEConfig  # what the Trainer makes of the section from now on


def moe_config_from(value) -> _MoEConfig:
    """A YAML's ``moe_config`` section, MindFormers' object of it, or None, as that object."""
    if isinstance(value, _MoEConfig):
        return value
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"moe_config is {value!r}; expected a section of settings.")
    return MoEConfig(**dict(value or {}))


_load_by_library = model_runner.transform_and_load_checkpoint


def _load_by_model(config, model, network, *args, **kwargs):
    """Load for ModelRunner (MindIE): through ``network.load_weights(path)`` if the model has it.

    MindFormers' own loader leaves parameters random whose names it does not find, and cuts weights only by
    strategies of another model.
    """
    if hasattr(network, "load_weights"):
        return network.load_weights(config.checkpoint.load_path)
    return _load_by_library(config, model, network, *args, **kwargs)


model_runner.transform_and_load_checkpoint = _load_by_model


class _AnyNotFinite(nn.Cell):
    """Whether any element of any gradient is infinite or not a number; a scalar bool tensor."""

    def __init__(self):
        super().__init__()
        self.isfinite = ops.IsFinite()
        self.all = ops.ReduceAll()
        self.logical_and = ops.LogicalAnd()
        self.logical_not = ops.LogicalNot()

    def construct(self, grads):
        finite = self.all(self.isfinite(grads[0]))
        for grad in grads[1:]:
            finite = self.logical_and(finite, self.all(self.isfinite(grad)))
        return self.logical_not(finite)


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class MFTrainOneStepCell(_MFTrainOneStepCell):
    """MindFormers' training step, under its own name, with an overflow check that exists on a CPU.

    MindFormers takes every target but GPU and 910B for an NPU and falls through to
    ``NPUGetFloatStatusV2``, which a CPU does not have. Registered under the same name, so that a YAML
    written for NPUs trains on a CPU unchanged; on Ascend the inherited check runs.
    """

    def __init__(self, network, optimizer, **kwargs):
        super().__init__(network, optimizer, **kwargs)
        self.on_cpu = is_cpu()
        self.any_not_finite = _AnyNotFinite()

    def get_overflow_status(self, status, compute_output):
        """A scalar bool tensor: whether this step's gradients overflowed."""
        if self.on_cpu:
            return self.any_not_finite(compute_output)
        return super().get_overflow_status(status, compute_output)


def find_graph_again(cell: nn.Cell, phase: str, inputs: dict) -> None:
    """Make ``cell`` choose its graph anew if the shapes of ``inputs`` are not those of its last call.

    In the phases "prefill" and "increment" MindSpore runs the graph it ran last without looking at shapes,
    which fails where each shape has a graph of its own. Graphs that are compiled already are found again.
    """
    shapes = [value.shape for value in inputs.values()]
    if cell.last_shapes.get(phase) != shapes:
        cell.phase_cache.pop(phase, None)
        cell.last_shapes[phase] = shapes


def _ids_of(value) -> set:
    return set(value) if isinstance(value, list | tuple) else {value}


class PreTrainedModel(_PreTrainedModel):
    """MindFormers' model, whose next tokens are chosen by rules of our own: see generation/sampling.py."""

    def generate(self, input_ids, generation_config=None, *args, seed=None, **kwargs):
        """MindFormers' ``generate``, which with DYNAMIC_NTK says every row's limit to every step.

        ``input_ids`` may be Rows: then no id is taken for padding, whatever ``pad_token_id`` is.
        ``longest`` ``[B]``: tokens that prompt and answer of each row may have, if it is not just what
        ``max_new_tokens`` or ``max_length`` says; see RequestLengths. ``seed``: of sampling; None goes on
        with NumPy's global random numbers.

        Raises:
            ValueError: a setting of sampling is none or misspelt, the seed is none, an id is no row of the
                embedding, the blocks of the cache may run out, or the logits of a step are no numbers.
        """
        check_seed(seed)
        if isinstance(kwargs.get("eos_token_id"), int):
            kwargs["eos_token_id"] = [kwargs["eos_token_id"]]
        if isinstance(input_ids, Rows):
            preferred = (kwargs.get("pad_token_id"), self.config.pad_token_id)
            ends = _ids_of(kwargs.get("eos_token_id")) | _ids_of(self.config.eos_token_id)
            input_ids, kwargs["pad_token_id"] = pad_rows(
                input_ids, [padding for padding in preferred if padding not in ends]
            )
        settings = deepcopy(generation_config or GenerationConfig.from_model_config(self.config))
        check_spelling(settings.update(**kwargs))
        self.sampling = Sampling.of(settings)
        rows = np.array(input_ids)
        rows = rows.reshape(-1, rows.shape[-1])
        lengths, _ = get_valid_length_each_example(rows, settings.pad_token_id or 0)
        check_ids(rows, lengths, self.config.vocab_size)
        self.prompt_lengths = lengths
        self.random = row_generators(len(lengths), seed) if self.sampling.do_sample else None
        if not self.config.use_past:
            return super().generate(input_ids, generation_config, *args, **kwargs)
        limits = settings.max_new_tokens, settings.max_length
        check_pool(self.config, limits_of_rows(self.config, lengths, *limits))
        if self.config.extend_method == "DYNAMIC_NTK" and kwargs.get("longest") is None:
            kwargs["longest"] = longest_of_rows(self.config, lengths, *limits)
        try:
            return super().generate(input_ids, generation_config, *args, **kwargs)
        except BaseException:
            self.block_mgr = None  # or the blocks of an interrupted answer would never be free again
            raise

    def forward(self, input_ids, valid_length_each_example, *, prefill=None, **kwargs):
        """MindFormers' ``forward``, which reads prompts in pieces where ``prefill_chunk`` says so."""
        lengths = valid_length_each_example
        if not (prefill and self.config.use_past and 0 < self.config.prefill_chunk < np.sum(lengths)):
            return super().forward(input_ids, lengths, prefill=prefill, **kwargs)

        def run(input_ids, *, prefill, **step):
            inputs = self.prepare_inputs_for_generation(input_ids, prefill=prefill, **step)
            return self._incremental_infer(inputs, prefill, None)

        logits = read_in_chunks(run, self.config, input_ids, lengths, **kwargs)
        return logits, np.arange(len(lengths))

    def get_logits_processor(self, generation_config, input_ids_seq_length, logits_processor):
        """The processors that a caller gives; MindFormers' own are not used."""
        return logits_processor

    @staticmethod
    def get_logits_warper(generation_config):
        """None of MindFormers' warpers."""

    def postprocess(
        self,
        input_ids,
        is_finished,
        res,
        generation_config,
        valid_length_each_example,
        current_index,
        logits_processor=None,
        logits_warper=None,
        need_gather_logits=True,
    ):
        """The next token of every row that is not finished, as MindFormers' ``postprocess`` returns them.

        Args:
            input_ids: ``[B, seq_length]``, each row's tokens, then padding.
            is_finished: ``[B]``, rows that take no further token.
            res: logits ``[B, V]``, or ``[B * seq_length, V]`` without a cache.
            generation_config: MindFormers' GenerationConfig.
            valid_length_each_example: ``[B]``, tokens of each row.
            current_index: ``[B]``, the row of ``res`` that belongs to each row.
            logits_processor: a caller's own processors.
            logits_warper: not used.
            need_gather_logits: whether ``res`` may have all positions.

        Returns:
            Tokens ``[B]`` ([] for a finished row), scores and logits ``[B, V]`` where they are asked for
            (else None), ``is_finished``.

        Raises:
            ValueError: logits are NaN or infinite.
        """
        logits = res[0] if isinstance(res, tuple) else res
        logits = logits.reshape((-1, logits.shape[-1]))
        if need_gather_logits and logits.shape[0] > len(current_index):
            logits = logits[Tensor(current_index, ms.int32)]
        logits = logits.asnumpy()
        rows, wanted = len(is_finished), generation_config.return_dict_in_generate
        scores = logits.copy() if wanted and generation_config.output_scores else None
        targets = [[] for _ in range(rows)]
        for row in (row for row in range(rows) if not is_finished[row]):
            length, prompt = int(valid_length_each_example[row]), int(self.prompt_lengths[row])
            check_finite(logits[row], length - prompt + 1, length, row, rows)
            tokens = input_ids[row, :length]
            more = partial(_processed, logits_processor, tokens) if logits_processor else None
            random = self.random[row] if self.random else None
            targets[row], chosen_by = next_token(logits[row], tokens, prompt, self.sampling, random, more)
            if scores is not None:
                scores[row] = chosen_by
        return targets, scores, logits if wanted and generation_config.output_logits else None, is_finished


read_as_rows(PreTrainedModel)


def _processed(processors, tokens, scores: np.ndarray) -> np.ndarray:
    """Scores ``[V]`` after the processors of a caller."""
    return processors(tokens[None], scores[None].astype(np.float32), [False])[0].astype(np.float64)
