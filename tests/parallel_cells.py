"""The Trainer's training step of a small model, for the dry run's compiling process."""

import mindspore as ms
import numpy as np
from mindformers.core.lr import CosineWithWarmUpLR
from mindformers.core.optim import AdamW
from mindformers.wrapper.wrapper import MFPipelineWithLossScaleCell, PipelineCellWithTwoOutput
from mindspore import Tensor, nn
from mindspore.nn.wrap.cell_wrapper import GradAccumulationCell, _VirtualDatasetCell

from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_compat import MFTrainOneStepCell
from research.telechat2.telechat_config import TelechatConfig


def build(config: dict, copies: int = 1, accumulation: int = 1):
    """The step as MindFormers wraps it, and its input of the global batch of one row for each device.

    Args:
        config: of the model; its ``parallel_config`` says how many stages and micro-batches there are.
        copies: ``micro_batch_interleave_num``.
        accumulation: ``gradient_accumulation_steps``.
    """
    model = TelechatForCausalLM(TelechatConfig(**config))
    plan, per_token = model.config.parallel_config, model.config.calculate_per_token_loss
    rate = CosineWithWarmUpLR(1e-4, warmup_steps=1, total_steps=10)
    optimizer = AdamW(model.trainable_params(), learning_rate=rate)
    network = nn.MicroBatchInterleaved(model, copies) if copies > 1 else model
    micro_batches = plan.micro_batch_num if plan.pipeline_stage > 1 else accumulation
    if plan.pipeline_stage > 1:
        network = (PipelineCellWithTwoOutput if per_token else nn.PipelineCell)(network, micro_batches)
    elif accumulation > 1:
        network = GradAccumulationCell(network, accumulation)
    arguments = {"use_clip_grad": True, "scale_sense": 1.0, "calculate_per_token_loss": per_token}
    if micro_batches > 1:
        arguments["micro_batch_num"] = micro_batches
    wrapper = MFPipelineWithLossScaleCell if micro_batches > 1 else MFTrainOneStepCell
    step = wrapper(_VirtualDatasetCell(network), optimizer, parallel_config=plan, **arguments)
    rows = plan.data_parallel * micro_batches * copies
    ids = Tensor(np.zeros((rows, model.config.seq_length + 1)), ms.int32)
    return step.set_train(True), [ids, ids]
