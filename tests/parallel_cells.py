"""The Trainer's training step of a small model, and what the dry run finds in it."""

import mindspore as ms
import numpy as np
from mindformers.core.lr import CosineWithWarmUpLR
from mindformers.core.optim import AdamW
from mindformers.wrapper.wrapper import (
    GradAccumulationCellWithTwoOutput,
    MFPipelineWithLossScaleCell,
    PipelineCellWithTwoOutput,
)
from mindspore import Tensor, nn
from mindspore.nn.wrap.cell_wrapper import GradAccumulationCell, _VirtualDatasetCell

from research.telechat2.plan.dry_run.simulate import simulate
from research.telechat2.run.train_step import MFTrainOneStepCell
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

MODEL = {
    "seq_length": 256, "hidden_size": 256, "num_layers": 2, "num_heads": 8, "n_kv_heads": 4,
    "intermediate_size": 512, "vocab_size": 1024, "compute_dtype": "bfloat16", "res_dtype": "float32",
    "layernorm_compute_type": "float32",
}  # fmt: skip
PLAN = {"data_parallel": 2, "model_parallel": 4, "use_seq_parallel": True, "vocab_emb_dp": False}


def compiled(plan=None, parallel=None, rank=0, steps=None, **model):
    """The dry run's report on MODEL and ``model`` under PLAN and ``plan``.

    ``parallel`` is for MindSpore's context, ``steps`` the arguments of build.
    """
    plan = PLAN | (plan or {})
    devices = plan["data_parallel"] * plan["model_parallel"]
    devices *= plan.get("pipeline_stage", 1) * plan.get("context_parallel", 1)
    arguments = {"config": MODEL | model | {"parallel_config": plan}} | (steps or {})
    return simulate("parallel_cells:build", arguments, device_num=devices, rank=rank, parallel=parallel)


def build(config: dict, accumulation: int = 1):
    """The step as MindFormers wraps it, and its input of the global batch of one row for each device.

    Args:
        config: of the model; its ``parallel_config`` says how many stages and micro-batches there are.
        accumulation: ``gradient_accumulation_steps``.
    """
    plan = config["parallel_config"]
    single = plan.get("pipeline_stage", 1) == 1 and accumulation == 1  # as the Trainer asks
    model = TelechatForCausalLM(TelechatConfig(**config, disable_lazy_inline=single))
    plan, per_token = model.config.parallel_config, model.config.calculate_per_token_loss
    rate = CosineWithWarmUpLR(1e-4, warmup_steps=1, total_steps=10)
    optimizer = AdamW(model.trainable_params(), learning_rate=rate)
    network = model
    micro_batches = plan.micro_batch_num if plan.pipeline_stage > 1 else accumulation
    if plan.pipeline_stage > 1:
        network = (PipelineCellWithTwoOutput if per_token else nn.PipelineCell)(network, micro_batches)
    elif accumulation > 1:
        accumulate = GradAccumulationCellWithTwoOutput if per_token else GradAccumulationCell
        network = accumulate(network, accumulation)
    arguments = {"use_clip_grad": True, "scale_sense": 1.0, "calculate_per_token_loss": per_token}
    if micro_batches > 1:
        arguments["micro_batch_num"] = micro_batches
    wrapper = MFPipelineWithLossScaleCell if micro_batches > 1 else MFTrainOneStepCell
    step = wrapper(_VirtualDatasetCell(network), optimizer, parallel_config=plan, **arguments)
    rows = plan.data_parallel * micro_batches
    ids = Tensor(np.zeros((rows, model.config.seq_length + 1)), ms.int32)
    return step.set_train(True), [ids, ids]
