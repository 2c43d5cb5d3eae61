"""The settings of the sections ``parallel_config``, ``recompute_config``, ``swap_config``, ``runner_config``.

Keys and defaults are MindFormers', of the release that pyproject.toml names; a test compares them.
"""

from dataclasses import dataclass, field
from typing import Any

from research.telechat2.config.fields import Section, setting

Choice = bool | list[Any] | dict[str, Any] | None  # of layers for operators, see recompute.py


@dataclass
class RecomputeSettings(Section):
    """recompute_config"""

    recompute: bool | int | list[Any] | None = setting(False, "Layers recomputed as a whole.")
    select_recompute: Choice = setting(False, "Layers of which operators are recomputed.")
    parallel_optimizer_comm_recompute: bool = setting(
        False, "`parallel.parallel_optimizer_config.optimizer_level: level3` does that.", choices=(False,)
    )
    select_comm_recompute: Choice = setting(False, "Layers whose all-gathers after norms are recomputed.")
    mp_comm_recompute: bool = setting(True, "Recompute the communication of tensor parallelism, too.")
    recompute_slice_activation: bool = setting(False, "Keep slices of a layer's input, and gather them.")
    select_recompute_exclude: Choice = setting(
        False, "Leave operators out of `select_recompute` instead.", choices=(False, None)
    )
    select_comm_recompute_exclude: Choice = setting(
        False, "Leave operators out of `select_comm_recompute` instead.", choices=(False, None)
    )


@dataclass
class SwapSettings(Section):
    """swap_config"""

    swap: bool = setting(False, "Activations stay on the device.", choices=(False,))
    layer_swap: object = setting(None, "Not supported.")
    op_swap: object = setting(None, "Not supported.")
    default_prefetch: int = setting(1, "Not supported.")


@dataclass
class ParallelSettings(Section):
    """parallel_config"""

    data_parallel: int = setting(1, "Copies of the model, each with its part of the batch.", least=1)
    model_parallel: int = setting(1, "Devices that share each matrix (tensor parallel).", least=1)
    context_parallel: int = setting(1, "Devices that share each sequence.", least=1)
    expert_parallel: int = setting(1, "Devices that share the experts, of `data_parallel`.", least=1)
    pipeline_stage: int = setting(1, "Stages of the pipeline.", least=1)
    micro_batch_num: int = setting(1, "Micro-batches of a step; read in a pipeline only.", least=1)
    seq_split_num: int = setting(1, "There is no sequence pipeline.", choices=(1,))
    use_seq_parallel: bool = setting(False, "Split norms and residuals by tokens over `model_parallel`.")
    optimizer_shard: bool | None = setting(
        None, "`parallel.enable_parallel_optimizer` decides on that.", choices=(None,)
    )
    gradient_aggregation_group: int = setting(4, "Groups in which gradients are all-reduced.", least=1)
    vocab_emb_dp: bool = setting(True, "Each device has the whole embedding and output projection.")
    context_parallel_algo: str = setting(
        "colossalai_cp",
        "Keys and values are gathered, heads exchanged for tokens, or both.",
        choices=("colossalai_cp", "ulysses_cp", "hybrid_cp"),
    )
    ulysses_degree_in_cp: int = setting(1, "With hybrid_cp: devices that exchange heads.", least=1)
    mem_coeff: float = setting(0.1, "Of MindSpore's automatic search, which is not used.")
    recompute: RecomputeSettings = field(default_factory=RecomputeSettings)
    swap: SwapSettings = field(default_factory=SwapSettings)


@dataclass
class RunnerSettings(Section):
    """runner_config"""

    batch_size: int = setting(1, "Sequences of a micro-batch on each data-parallel rank.", unit="sequences")
    epochs: int = setting(1, "Passes through the data.")
    sink_mode: bool = setting(True, "Feed the device from a queue.")
    sink_size: int = setting(1, "Steps between two returns to the host; -1: an epoch.", unit="steps")
    gradient_accumulation_steps: int | None = setting(1, "Steps whose gradients are added up for an update.")
    num_classes: int = setting(1, "Not read.")
    stop_step: int = setting(0, "Not read; see the callback TrainCallBack.")
