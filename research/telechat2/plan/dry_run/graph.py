"""What a dry run reports of one rank: tensors, parameters, operators and communication."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from research.telechat2.common.errors import UsageError

_BYTES = {
    "Bool": 1, "Int8": 1, "UInt8": 1, "Float16": 2, "BFloat16": 2, "Int16": 2, "UInt16": 2, "Float32": 4,
    "Int32": 4, "UInt32": 4, "Float64": 8, "Int64": 8, "UInt64": 8, "Complex64": 8,
}  # fmt: skip


class TensorType(NamedTuple):
    """Dtype as MindSpore's IR writes it (``BFloat16``) and the shape on this rank; -1 where it is dynamic."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of one such tensor; UsageError: the shape is dynamic."""
        if -1 in self.shape:
            raise UsageError(f"the bytes of a tensor of the dynamic shape {self.shape} are unknown.")
        return prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ShardedParameter:
    """One stored tensor: a weight, an optimizer state or an accumulated gradient.

    Attributes:
        name: as in the checkpoint.
        dtype: as MindSpore's IR writes it.
        shape: of the whole tensor on the cluster.
        local_shape: of what this rank stores.
        slice_shape: of what this rank computes with; larger than ``local_shape`` by the optimizer's sharding.
        device_matrix, tensor_map: MindSpore's layout: axis i is split ``device_matrix[-1 - tensor_map[i]]``
            times, or not at all where ``tensor_map[i]`` is -1. Empty where MindSpore has no layout.
        optimizer_shard: name of the group that shares the slice between its ranks, "" if none does.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    slice_shape: tuple[int, ...]
    device_matrix: tuple[int, ...]
    tensor_map: tuple[int, ...]
    optimizer_shard: str

    @property
    def bytes(self) -> int:
        return TensorType(self.dtype, self.local_shape).bytes


@dataclass(frozen=True, slots=True)
class Operator:
    """One computing operator.

    Attributes:
        kind: its primitive: ``MatMul``, ``RmsNorm``, ….
        inputs, outputs: its tensors, with local shapes.
        phase: ``forward`` (the optimizer's too), ``backward``, or ``recompute`` for what runs once more.
        scope: the names of the cells it belongs to: ``network.model.layers.0.attention``.
        micro_batch: the pipeline's micro-batch, None without pipeline.
        count: executions per step.
    """

    kind: str
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    phase: str
    scope: str
    micro_batch: int | None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Collective:
    """One communication operator; what is not said here is as in Operator.

    Attributes:
        kind: its primitive: ``AllReduce``, ``AllGather``, ``Send``, ….
        group: MindSpore's name of the group.
        ranks: the ranks that take part, in the group's order; of Send and Receive, sender and receiver.
        input, output: the tensors that this rank gives and gets.
        role: why it is there. ``operator``: an operator's strategy needs it (its sum over split products);
            ``redistribution``: two operators' layouts differ, as they are meant to where sequence parallelism
            gathers; ``gradient``: gradients are summed;
            ``weight``: the optimizer's sharding is undone; ``pipeline``: between stages; ``other``: written
            in the model or the optimizer itself.
        scope: in the backward pass, that of the forward node whose gradient it is.
        parameter: the parameter whose gradient or value it carries, "" else.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    input: TensorType
    output: TensorType
    phase: str
    role: str
    scope: str
    parameter: str
    micro_batch: int | None
    count: int = 1

    @property
    def bytes(self) -> int:
        """Bytes that this rank sends per execution, by an algorithm that sends as little as is possible."""
        n = len(self.ranks)
        if self.kind == "Receive":
            return 0
        if self.kind == "AllReduce":
            return 2 * self.input.bytes * (n - 1) // n
        if self.kind == "AllGather":
            return self.input.bytes * (n - 1)
        if self.kind in ("ReduceScatter", "AlltoAll", "AlltoAllV", "AllToAllv"):
            return self.input.bytes * (n - 1) // n
        return self.input.bytes
