"""Experts on many devices: one region of local code, its groups of ranks and its exchanges.

MindSpore shards primitives, and sending tokens to experts is no primitive's strategy. So the block runs in a
Morph, which sees each device's own tokens and own experts, and calls the collectives itself. The ranks of a
pipeline stage form a matrix (replicas, expert_parallel, model_parallel). Each device drops by the capacity of
its own tokens, and an expert's rows go by one all-to-all to the device that has the expert:

- ``ep_extend_tp``: experts lie whole on the expert- and tensor-parallel ranks together.
- else they lie on the expert-parallel ranks, their width split over the tensor-parallel ranks. With sequence
  parallelism these gather each other's rows before the products and add up the results after them; without
  it they have the same tokens, and add up the outputs.

The gradient takes the same way back. Router and biases are on every device.
"""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import auto_generate
from mindspore.ops import operations as P  # noqa: N812
from mindspore.parallel import Layout


@dataclass(frozen=True)
class ExpertPlan:
    """Where tokens and experts lie, as seen by ``rank``; the stage's ranks are a matrix, row by row.

    Args:
        replicas, expert_parallel, model_parallel: the matrix; data parallel is the product of the first two.
        ep_extend_tp: tensor-parallel ranks have whole experts of their own.
        sequence_parallel: tensor-parallel ranks have tokens of their own.
        rank: of this process. Its row of the matrix needs no more, since stages are whole rows.
    """

    replicas: int
    expert_parallel: int
    model_parallel: int
    ep_extend_tp: bool
    sequence_parallel: bool
    rank: int

    @property
    def owners(self) -> int:
        """Devices among which the experts are shared out."""
        return self.expert_parallel * (self.model_parallel if self.ep_extend_tp else 1)

    @property
    def width_parts(self) -> int:
        """Parts into which an expert's width is split."""
        return 1 if self.ep_extend_tp else self.model_parallel

    @property
    def token_parts(self) -> int:
        """Parts into which the tokens are split."""
        return self.replicas * self.expert_parallel * (self.model_parallel if self.sequence_parallel else 1)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes of the matrix that the tokens are split over."""
        return ("replica", "owner", "width") if self.sequence_parallel else ("replica", "owner")

    def layout(self, *axes):
        """A tensor's MindSpore layout on the matrix, as experts see it: (replicas, owners, width_parts).

        An axis of a parameter must be split by one axis of the matrix: MindSpore writes a parameter's layout
        down in such a way that it cannot cut slices by two.
        """
        matrix = Layout((self.replicas, self.owners, self.width_parts), ("replica", "owner", "width"))
        return matrix(*axes)

    def weight_layouts(self):
        """Layouts of ``[E, F, H]`` and of ``[E, H, F]``."""
        return self.layout("owner", "width", "None"), self.layout("owner", "None", "width")

    def owner_ranks(self) -> list[int]:
        """The ranks that exchange rows, those with the first experts first."""
        size = self.expert_parallel * self.model_parallel
        first = self.rank // size * size
        if self.ep_extend_tp:
            return list(range(first, first + size))
        return list(range(first + self.rank % self.model_parallel, first + size, self.model_parallel))

    def width_ranks(self) -> list[int]:
        """The tensor-parallel ranks."""
        first = self.rank // self.model_parallel * self.model_parallel
        return list(range(first, first + self.model_parallel))


class ExpertExchange(nn.Cell):
    """OwnExperts for many devices. N: owners, C: rows of an expert from one device's tokens."""

    def __init__(self, plan: ExpertPlan, num_experts: int):
        super().__init__()
        self.owners, self.own_experts = plan.owners, num_experts // plan.owners
        self.gathers = plan.width_parts > 1 and plan.sequence_parallel
        self.adds_up = plan.width_parts > 1 and not plan.sequence_parallel
        self.senders = plan.owners * (plan.width_parts if self.gathers else 1)
        if self.owners > 1:
            group = _group(plan.owner_ranks())
            self.to_owners = P.AlltoAll(self.owners, 0, 0, group)
            self.from_owners = P.AlltoAll(self.owners, 0, 0, group)
        if self.gathers:
            group = _group(plan.width_ranks())
            self.gather_rows = P.AllGather(group)
            self.add_rows = P.ReduceScatter(group=group)
        if self.adds_up:
            self.add_outputs = P.AllReduce(group=_group(plan.width_ranks()))
        self.transpose = P.Transpose()
        self.reshape = P.Reshape()

    def forth(self, block):
        """The tokens' rows ``[E * C, H]`` to all rows of the own experts ``[E / N, senders * C, H]``."""
        hidden = block.shape[1]
        if self.owners > 1:
            block = self.to_owners(block)
        if self.gathers:
            block = self.gather_rows(block)
        block = self.reshape(block, (self.senders, self.own_experts, -1, hidden))
        return self.reshape(self.transpose(block, (1, 0, 2, 3)), (self.own_experts, -1, hidden))

    def back(self, rows):
        """The inverse; rows of which width parts hold summands are added up."""
        hidden = rows.shape[2]
        rows = self.reshape(rows, (self.own_experts, self.senders, -1, hidden))
        block = self.reshape(self.transpose(rows, (1, 0, 2, 3)), (-1, hidden))
        if self.gathers:
            block = self.add_rows(block)
        return self.from_owners(block) if self.owners > 1 else block

    def add_up(self, y):
        """Summands ``[T, H]`` of the outputs, where the width parts have the same tokens, to their sum."""
        return self.add_outputs(y) if self.adds_up else y


class DroplessExchange(nn.Cell):
    """DroplessExpertsFused for many devices: as many rows as there are go to the owners of their experts.

    N: owners, R: rows that this device receives. First the devices tell each other how many rows they send.
    AlltoAllV reads these numbers on the host, and breaks where it receives nothing: so each device has tokens
    of zeros behind its own, which go to every owner. All index arithmetic is int32.

    Args:
        plan: one by which experts lie whole on their owners, of which there are several.
        experts: DroplessExpertsFused.
        num_experts, top_k, hidden_size: E, k and H.
    """

    def __init__(self, plan: ExpertPlan, experts: nn.Cell, num_experts: int, top_k: int, hidden_size: int):
        super().__init__()
        self.experts = experts
        self.owners, self.own_experts = plan.owners, num_experts // plan.owners
        self.padding = -(-self.owners // top_k)
        to_all = np.arange(self.padding * top_k, dtype=np.int32).reshape(-1, top_k) % self.owners
        self.padding_experts = Tensor(to_all * self.own_experts)
        group = _group(plan.owner_ranks())
        self.tell = P.AlltoAll(self.owners, 0, 0, group)
        self.to_owners = P.AlltoAllV(group, hidden_size)
        self.from_owners = P.AlltoAllV(group, hidden_size)
        self.to_host = P.MoveTo()
        self.sent_experts = SentExperts(self.own_experts)
        self.permute = auto_generate.MoeTokenPermute()
        self.unpermute = auto_generate.MoeTokenUnpermute()
        self.concat = P.Concat(0)
        self.fill = P.Zeros()
        self.slice = P.StridedSlice()
        self.sum = P.ReduceSum()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, x, experts, gates, w1, w3, w2, bias):
        tokens, hidden = x.shape
        padded = self.concat((experts, self.padding_experts))
        counts = self.experts.row_counts(padded)
        told = self.reshape(self.tell(counts), (self.owners, self.own_experts))
        sent, received = self._totals(self.reshape(counts, told.shape)), self._totals(told)

        rows, order = self.permute(self.concat((x, self.fill((self.padding, hidden), x.dtype))), padded)
        rows = self.reshape(self.to_owners(self.reshape(rows, (-1,)), sent, received), (-1, hidden))
        experts_of_rows, own_counts = self.sent_experts(told, rows), self.sum(told, 0)
        rows = self.experts.without_bias(rows, experts_of_rows, None, own_counts, w1, w3, w2)
        rows = self.reshape(self.from_owners(self.reshape(rows, (-1,)), received, sent), (-1, hidden))

        no_gates = self.fill((self.padding, gates.shape[1]), gates.dtype)
        y = self.unpermute(rows, order, self.concat((gates, no_gates)))
        y = self.slice(y, (0, 0), (tokens, hidden), (1, 1))
        return self.experts.add_bias(y, experts, gates, bias)

    def _totals(self, counts):
        """Rows for each owner or from each sender, where the host can read them."""
        return self.to_host(self.cast(self.sum(counts, 1), ms.int64), "CPU", True)


class SentExperts(nn.Cell):
    """Which of the own experts each row is for, where the senders' rows lie expert after expert.

    Inputs: counts ``[N, E / N]`` int32, the rows of each sender for each of the own experts; and the rows
    ``[R, H]`` themselves.

    Output: ``[R]`` int32.
    """

    def __init__(self, own_experts: int):
        super().__init__()
        self.own_experts = own_experts
        self.range = P.Range()
        self.cumsum = P.CumSum()
        self.greater_equal = P.GreaterEqual()
        self.sum = P.ReduceSum()
        self.mod = P.FloorMod()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, counts, rows):
        cumulative = self.cumsum(self.reshape(counts, (1, -1)), 1)
        numbers = self.reshape(self.cast(self.range(0, rows.shape[0], 1), ms.int32), (-1, 1))
        runs_before = self.sum(self.cast(self.greater_equal(numbers, cumulative), ms.int32), 1)
        return self.mod(runs_before, self.own_experts)


class ExpertRegion(nn.Cell):
    """An ExpertBlock inside a Morph: the same inputs and outputs, those of all devices together."""

    def __init__(self, block: nn.Cell, plan: ExpertPlan):
        super().__init__()
        self.block = block
        self.token_parts, self.num_experts = plan.token_parts, block.num_experts
        self.morph = P.Morph(self.body, self.infer_shape, self.infer_dtype)
        self.morph.add_prim_attr("self_define_shard", True)
        # Nothing is printed. MindSpore 2.9 fails to compile an evaluation with this effect behind a
        # pipeline's first stage, since the effect of the layer before is not there.
        self.morph.add_prim_attr("side_effect_io", False)
        tokens = plan.layout(plan.token_axes, "None")
        shares = plan.layout(plan.token_axes, "None", "None")
        everywhere = plan.layout("None", "None")
        rows, columns = plan.weight_layouts()
        self.morph.shard(
            in_strategy=(tokens, everywhere, rows, rows, columns, plan.layout(*["None"] * 4)),
            out_strategy=(tokens, shares),
        )

    def construct(self, x, router, w1, w3, w2, bias):
        return self.morph(x, router, w1, w3, w2, bias)

    def body(self, x, router, w1, w3, w2, bias):
        """What each device does."""
        return self.block(x, router, w1, w3, w2, bias)

    def infer_shape(self, x, router, w1, w3, w2, bias):
        """Shapes of outputs and shares, of all devices together."""
        return x, [self.token_parts, 3, self.num_experts]

    def infer_dtype(self, x, router, w1, w3, w2, bias):
        """Their dtypes."""
        return w1, ms.float32


def shard_experts(moe: nn.Cell, plan: ExpertPlan) -> None:
    """Share out a TelechatMoE; TelechatConfig has checked that experts divide.

    Without a capacity, so in any evaluation, experts must lie whole on their owners: see run/evaluation.py.
    """
    if moe.with_capacity:
        moe.capacity_block.experts.exchange = ExpertExchange(plan, moe.capacity_block.num_experts)
        moe.capacity_block = ExpertRegion(moe.capacity_block, plan)
    if plan.width_parts == 1:  # in evaluation also where training has a capacity
        block = moe.dropless_block
        if plan.owners > 1:
            sizes = block.num_experts, block.router.top_k, moe.ffn.w1.weight.shape[2]
            block.experts = DroplessExchange(plan, block.experts, *sizes)
        moe.dropless_block = ExpertRegion(block, plan)
    rows, columns = plan.weight_layouts()
    moe.cast_w1.shard(in_strategy=(rows,))
    moe.cast_w3.shard(in_strategy=(rows,))
    moe.cast_w2.shard(in_strategy=(columns,))
    moe.cast_bias.shard(in_strategy=(plan.layout(*["None"] * 4),))
    moe.mean_over_devices.shard(((plan.token_parts, 1, 1),))
    for primitive in (moe.row, moe.rows):
        primitive.shard(((1, 1),))
    moe.keep.shard(((1, 1), (1, 1)))
    moe.mul.shard(((1, 1), (1, 1)))
    moe.sum.shard(((1, 1),))
    moe.scale.shard(((1,), ()))


def _group(ranks: list[int]) -> str:
    """The name of a communication group, created if it is new: its first, second and last rank."""
    name = f"experts-{ranks[0]}-{ranks[1]}-to-{ranks[-1]}"
    if name not in _GROUPS:
        ms.communication.create_group(name, ranks)
        _GROUPS.add(name)
    return name


_GROUPS: set[str] = set()
