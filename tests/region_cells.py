"""Layers of experts, each shared out by a plan of its own, for the dry run's compiling process."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.model.kernels.select import choose_kernels
from research.telechat2.model.moe import TelechatMoE
from research.telechat2.parallel.experts import ExpertPlan, shard_experts
from research.telechat2.telechat_config import TelechatConfig


class Layer(nn.Cell):
    """What stands around experts in the model: operators that each device does for its own tokens."""

    def __init__(self, config: TelechatConfig, plan: ExpertPlan):
        super().__init__()
        self.moe = TelechatMoE(config, choose_kernels(config))
        shard_experts(self.moe, plan)
        self.norm = Parameter(Tensor(np.ones(config.hidden_size, np.float32)), name="norm")
        tokens = (plan.token_parts, 1)
        self.mul = P.Mul().shard((tokens, (1,)))
        self.cast = P.Cast().shard((tokens,))
        # A gradient that depends on the data: MindSpore adds up constants without communication.
        self.square = P.Square().shard((tokens,))
        self.sum = P.ReduceSum().shard((tokens,))
        self.reshape = P.Reshape()
        self.add = P.Add().shard(((1,), (1,)))

    def construct(self, x):
        y, balance_loss = self.moe(self.mul(x, self.norm))
        total = self.sum(self.square(self.cast(y, ms.float32)))
        return self.add(self.reshape(total, (1,)), balance_loss)


class Layers(nn.Cell):
    """The sum of what the layers return; each has the same tokens."""

    def __init__(self, layers: list[nn.Cell]):
        super().__init__()
        self.layers = nn.CellList(layers)
        self.add = P.Add().shard(((1,), (1,)))

    def construct(self, x):
        total = self.layers[0](x)
        for layer in self.layers[1:]:
            total = self.add(total, layer(x))
        return total


class Gradients(nn.Cell):
    """Of all weights."""

    def __init__(self, network: nn.Cell):
        super().__init__()
        self.network = network
        self.weights = ms.ParameterTuple(network.trainable_params())
        self.gradients = ops.GradOperation(get_by_list=True)

    def construct(self, x):
        return self.gradients(self.network, self.weights)(x)


def build(layers: list[dict], tokens: int, num_experts: int, hidden: int, width: int, top_k: int):
    """Gradients of layers, and their input ``[tokens, 1]``: as wide as hidden it may not fit into memory.

    Args:
        layers: of each layer its ``capacity_factor``, and the arguments of its ExpertPlan as ``plan``.
    """
    rank = ms.communication.get_rank()
    built = []
    for layer in layers:
        moe_config = {
            "expert_num": num_experts, "num_experts_chosen": top_k,
            "capacity_factor": layer["capacity_factor"],
            "aux_loss_types": ["expert"], "aux_loss_factors": [0.01],
        }  # fmt: skip
        config = TelechatConfig(
            hidden_size=hidden, intermediate_size=width, num_heads=hidden // 64, num_layers=1, vocab_size=64,
            compute_dtype="bfloat16", moe_config=moe_config,
        )  # fmt: skip
        built.append(Layer(config, ExpertPlan(*layer["plan"], rank=rank)))
    network = Layers(built).set_train(True)
    return Gradients(network), [Tensor(np.zeros((tokens, 1)), ms.float32)]


class TrainedAndPredicted(nn.Cell):
    """Gradients of experts without a capacity, and what experts with turned weights answer."""

    def __init__(self, trained: nn.Cell, predicting: nn.Cell):
        super().__init__()
        self.trained, self.predicting = trained, predicting
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, x, experts, gates, w1, w3, w2, bias, dy):
        turned = [P.Reshape()(w, (w.shape[0], w.shape[2], w.shape[1])) for w in (w1, w3, w2)]
        y = self.predicting(x, experts, gates, *turned, bias)
        return y, self.gradients(self.trained)(x, experts, gates, w1, w3, w2, bias, dy)


def build_dropless(tokens: int, num_experts: int, hidden: int, width: int, top_k: int):
    """TrainedAndPredicted on one device, which needs no region, and its inputs."""
    ms.set_auto_parallel_context(full_batch=False, parallel_mode="stand_alone")
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_heads": 1,
        "compute_dtype": "bfloat16",
        "rotary_dtype": "bfloat16",
    }
    moe_config = {"expert_num": num_experts, "num_experts_chosen": top_k, "capacity_factor": 0.0}
    cells = [
        choose_kernels(config).dropless_experts(config)
        for config in (
            TelechatConfig(**sizes, moe_config=moe_config, use_past=use_past) for use_past in (False, True)
        )
    ]
    inputs = [
        Tensor(np.zeros(shape), ms.int32 if name == "experts" else ms.bfloat16)
        for name, shape in {
            "x": (tokens, hidden), "experts": (tokens, top_k), "gates": (tokens, top_k),
            "w1": (num_experts, width, hidden), "w3": (num_experts, width, hidden),
            "w2": (num_experts, hidden, width), "bias": (1, num_experts, 1, hidden), "dy": (tokens, hidden),
        }.items()
    ]  # fmt: skip
    return TrainedAndPredicted(*cells), inputs
