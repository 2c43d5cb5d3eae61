"""The graphs of paged prediction with Dynamic NTK for Ascend, compiled without NPUs."""

import mindspore as ms
from mindspore.nn.utils import no_init_parameters

from research.telechat2.generation.step_inputs import dynamic_inputs
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

INPUTS = (
    "input_ids", "labels", "position_ids", "batch_valid_length", "block_tables", "slot_mapping", "last_token",
    "rotary_lengths",
)  # fmt: skip


def build(config: dict):
    """Compiles the prefill graph, and returns model and inputs of the decode graph; see simulate."""
    ms.reset_auto_parallel_context()
    with no_init_parameters():
        model = TelechatForCausalLM(TelechatConfig(**config))
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
