"""One of several CPU processes that share experts: ``request.npz`` in a folder becomes ``rank_N.npz``.

The cells are those of the cluster. What a CPU has no kernels for is put together of what it has, with
gradients by MindSpore's own rules: collectives of AllReduce, and Ascend's kernels of gathers and products.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.config.moe import MoESettings
from research.telechat2.model.kernels import ascend
from research.telechat2.model.kernels.ascend import DroplessExpertsFused
from research.telechat2.model.kernels.moe_dispatch import CapacityExperts
from research.telechat2.model.kernels.reference import SwiGLUReference
from research.telechat2.model.kernels.select import ReferenceKernels
from research.telechat2.model.moe import ExpertBlock
from research.telechat2.parallel import experts as parallel_experts
from research.telechat2.parallel.experts import DroplessExchange, ExpertExchange, ExpertPlan, _group

MOST_ROWS = 256  # that a device sends


class Collective(nn.Cell):
    """Everyone's tensors ``[n, …]``, and the place of this process among them."""

    def __init__(self, ranks: list[int]):
        super().__init__()
        self.n, self.place = len(ranks), ranks.index(ms.communication.get_rank())
        mask = np.zeros((self.n, 1), np.float32)
        mask[self.place] = 1
        self.mask = Tensor(mask)
        self.all_reduce = P.AllReduce(group=_group(ranks))

    def everyones(self, x):
        return self.all_reduce(self.mask * x.reshape((1, -1))).reshape((self.n, *x.shape))


class AllGather(Collective):
    def construct(self, x):
        return self.everyones(x).reshape((self.n * x.shape[0], *x.shape[1:]))


class ReduceScatter(Collective):
    def construct(self, x):
        return self.all_reduce(x).reshape((self.n, x.shape[0] // self.n, *x.shape[1:]))[self.place]


class AllToAll(Collective):
    def construct(self, x):
        parts = self.everyones(x).reshape((self.n, self.n, x.shape[0] // self.n, *x.shape[1:]))
        return parts[:, self.place].reshape(x.shape)


class AllToAllV(Collective):
    """Operator by operator only: how long its parts are stands in the data."""

    def __init__(self, ranks: list[int], block_size: int):
        super().__init__(ranks)
        self.block_size = block_size

    def construct(self, x, sent, received):
        x = x.reshape((-1, self.block_size))
        counts = self.everyones(sent.astype(ms.float32)).asnumpy().astype(int)
        np.testing.assert_array_equal(counts[:, self.place], received.asnumpy())
        all_rows = self.everyones(ops.concat((x, ops.zeros((MOST_ROWS - len(x), self.block_size)))))
        starts = counts.cumsum(1) - counts
        parts = [
            all_rows[sender, start : start + length]
            for sender, (start, length) in enumerate(
                zip(starts[:, self.place].tolist(), counts[:, self.place].tolist(), strict=True)
            )
        ]
        return ops.concat(parts).reshape((-1,))


class CountsToAll(AllToAll):
    """Of integers."""

    def construct(self, x):
        return super().construct(x.astype(ms.float32)).astype(ms.int32)


def permute(x, experts):
    order = np.argsort(experts.asnumpy().reshape(-1), kind="stable")
    rows = ops.gather(x, Tensor((order // (len(order) // len(x))).astype(np.int32)), 0)
    return rows, Tensor(np.argsort(order).astype(np.int32))


def unpermute(rows, order, gates):
    rows = ops.gather(rows, order, 0)
    return rows if gates is None else (rows.reshape((*gates.shape, -1)) * gates.expand_dims(-1)).sum(1)


def grouped_matmul(split_item, group_type):
    def function(x, weight, *nothing):
        (x,), (weight,) = x, weight
        ends = nothing[-1].asnumpy().tolist()
        groups = list(zip([0, *ends[:-1]], ends, strict=True))
        if group_type == 0:
            return [ops.concat([ops.matmul(x[a:b], weight[e]) for e, (a, b) in enumerate(groups) if a < b])]
        empty = ops.zeros((x.shape[0], weight.shape[1]))
        return [ops.stack([ops.matmul(x[:, a:b], weight[a:b]) if a < b else empty for a, b in groups])]

    return function


ASCEND = SimpleNamespace(
    MoeTokenPermute=lambda: permute,
    MoeTokenUnpermute=lambda: unpermute,
    GroupedMatmul=grouped_matmul,
    TransposeExtView=lambda: lambda x, a, b: x.swapaxes(a, b),
)


def with_capacity(plan: ExpertPlan, moe: MoESettings) -> nn.Cell:
    exchange = ExpertExchange(plan, moe.num_experts)
    cells = {}
    if plan.owners > 1:
        cells |= {name: AllToAll(plan.owner_ranks()) for name in ("to_owners", "from_owners")}
    if exchange.gathers:
        cells |= {"gather_rows": AllGather(plan.width_ranks()), "add_rows": ReduceScatter(plan.width_ranks())}
    for name, cell in cells.items():
        delattr(exchange, name)
        setattr(exchange, name, cell)
    experts = CapacityExperts(moe, SwiGLUReference())
    experts.exchange = exchange
    return experts


def dropless(plan: ExpertPlan, moe: MoESettings, hidden: int) -> nn.Cell:
    primitives = SimpleNamespace(**{name: getattr(P, name) for name in dir(P) if not name.startswith("_")})
    primitives.AlltoAll = lambda n, split_dim, concat_dim, ranks: CountsToAll(ranks)
    primitives.AlltoAllV = AllToAllV
    primitives.MoveTo = lambda: lambda x, place, blocking: x
    with (
        mock.patch.object(ascend, "auto_generate", ASCEND),
        mock.patch.object(parallel_experts, "auto_generate", ASCEND),
        mock.patch.object(parallel_experts, "P", primitives),
    ):
        experts = DroplessExpertsFused(moe, SwiGLUReference())
        with mock.patch.object(parallel_experts, "_group", list):
            return DroplessExchange(plan, experts, moe.num_experts, moe.top_k, hidden)


class Loss(nn.Cell):
    """``sum of y * dy and shares * dshares``, and y and shares."""

    def __init__(self, block, dy, dshares):
        super().__init__()
        self.block, self.dy, self.dshares = block, dy, dshares

    def construct(self, *operands):
        y, shares = self.block(*operands)
        return (y * self.dy).sum() + (shares * self.dshares).sum(), y, shares


def run(case: dict, arrays: dict) -> dict:
    """Outputs and gradients of one case on this rank."""
    ms.set_context(mode=ms.PYNATIVE_MODE if case["factor"] == 0 else ms.GRAPH_MODE)
    plan = ExpertPlan(*case["plan"], rank=ms.communication.get_rank())
    moe = MoESettings(
        num_experts=case["num_experts"], top_k=case["top_k"], capacity_factor=case["factor"],
        token_major=case["rule"] == "token-major", balance_factor=0.0, ep_extend_tp=True,
    )  # fmt: skip
    local = [Tensor(arrays[f"{case['name']}/{plan.rank}/{i}"]) for i in range(8)]
    hidden = local[0].shape[1]
    experts = with_capacity(plan, moe) if moe.capacity_factor else dropless(plan, moe, hidden)
    config = SimpleNamespace(moe=moe, compute_dtype=ms.float32)
    block = ExpertBlock(config, ReferenceKernels, experts, moe.capacity_factor > 0)
    (_, y, shares), gradients = ops.value_and_grad(Loss(block, *local[6:]), tuple(range(6)), has_aux=True)(
        *local[:6]
    )
    outputs = [y, shares, *gradients]
    return {f"{case['name']}/{i}": tensor.asnumpy() for i, tensor in enumerate(outputs)}


def main() -> None:
    folder = Path(sys.argv[1])
    ms.set_context(device_target="CPU")
    ms.communication.init()
    arrays = dict(np.load(folder / "request.npz"))
    found = {}
    for case in json.loads((folder / "cases.json").read_text()):
        found |= run(case, arrays)
    np.savez(folder / f"rank_{ms.communication.get_rank()}.npz", **found)
    ops.AllReduce()(Tensor(np.ones(1, np.float32)))  # who ends first takes the others' group along


if __name__ == "__main__":
    main()
