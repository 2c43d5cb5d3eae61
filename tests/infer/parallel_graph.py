"""The parallel model's graphs for Ascend, compiled without NPUs for any prompts and batches."""

import mindspore as ms
from mindspore import Parameter
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from research.telechat2.generation.step_inputs import dynamic_inputs
from research.telechat2.infer.telechat import ParallelTelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

INPUTS = (
    "input_ids", "labels", "position_ids", "batch_valid_length", "block_tables", "slot_mapping", "last_token",
)  # fmt: skip


def build(config: dict):
    """Compiles the prefill graph, and returns model and inputs of the decode graph; see simulate."""
    ms.reset_auto_parallel_context()  # no graph is shared out: each process has its own
    plan = {"model_parallel": ms.communication.get_group_size(), "vocab_emb_dp": False}
    with no_init_parameters():
        model = ParallelTelechatForCausalLM(TelechatConfig(**config, use_past=True, parallel_config=plan))
        if model.has_experts:
            _transpose(model)
    model.set_train(False)
    inputs = dynamic_inputs(model.config)
    model.set_inputs(**inputs)
    inputs = [inputs.get(name) for name in INPUTS]
    model.phase = "prefill"
    model.add_flags_custom(is_first_iteration=True)
    model.compile(*inputs)
    model.phase = "increment"
    model.add_flags_custom(is_first_iteration=False)
    return model, inputs


def _transpose(model) -> None:
    """As ``ExpertWeights.transpose`` does, which computes."""
    for layer in model.model.layers:
        for stack in (layer.feed_forward.ffn.w1, layer.feed_forward.ffn.w3, layer.feed_forward.ffn.w2):
            experts, rows, columns = stack.weight.shape
            empty = initializer("zeros", (experts, columns, rows), stack.weight.dtype)
            stack.weight = Parameter(empty, name=stack.weight.name)
