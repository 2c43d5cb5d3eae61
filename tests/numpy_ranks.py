"""The cells of the mixture of experts computed by NumPy, on as many simulated ranks as one likes.

Inside ``numpy_cells`` the cells that are built get NumPy functions for their primitives, and run as the
Python that they are: each rank of a World in a thread of its own, where collectives wait for each other.
Float32 is computed in float64, so that all differences are mistakes.
"""

import contextlib
import threading
from types import SimpleNamespace
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import nn

from research.telechat2.model import moe, moe_router
from research.telechat2.model.kernels import ascend, moe_dispatch
from research.telechat2.parallel import experts as parallel_experts

DTYPES = {ms.float32: np.float64, ms.int32: np.int32, ms.int64: np.int64}


class World:
    """Ranks that run the same function and exchange arrays; a group is the tuple of its ranks."""

    def __init__(self, size: int):
        self.size = size
        self.local = threading.local()
        self.lock = threading.Lock()
        self.slots, self.barriers = {}, {}

    def run(self, function) -> list:
        """``function(rank)`` of all ranks.

        Raises the first error of a rank, which fails the others: nobody waits for who never comes.
        """
        results, errors = [None] * self.size, []

        def body(rank):
            self.local.rank = rank
            try:
                results[rank] = function(rank)
            except Exception as error:  # noqa: BLE001 is raised below
                errors.append(error)
                for barrier in list(self.barriers.values()):
                    barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
            raise (real or errors)[0]
        return results

    def gather(self, ranks: tuple[int, ...], value) -> list:
        """The values of all ranks of the group, in its order."""
        with self.lock:
            barrier = self.barriers.setdefault(ranks, threading.Barrier(len(ranks), timeout=20))
            slots = self.slots.setdefault(ranks, {})
        slots[self.local.rank] = value
        barrier.wait()
        values = [slots[rank] for rank in ranks]
        barrier.wait()
        return values

    def place(self, ranks: tuple[int, ...]) -> int:
        """Of the calling rank in the group."""
        return ranks.index(self.local.rank)


def collectives(world: World) -> dict:
    """Under MindSpore's names; all along the first axis."""

    def all_to_all(split_count, split_dim, concat_dim, group):
        assert (split_count, split_dim, concat_dim) == (len(group), 0, 0)
        place = world.place(group)
        return lambda x: np.concatenate([np.split(y, len(group))[place] for y in world.gather(group, x)])

    def all_to_all_v(group, block_size):
        place = world.place(group)

        def exchange(x, sent, received):
            assert x.shape == (sent.sum() * block_size,) and received.sum() > 0
            parts = []
            for rows, counts in world.gather(group, (x.reshape(-1, block_size), sent)):
                parts.append(np.split(rows, np.cumsum(counts)[:-1])[place])
            np.testing.assert_array_equal([len(part) for part in parts], received)
            return np.concatenate(parts).reshape(-1)

        return exchange

    def reduce_scatter(group):
        return lambda x: np.split(sum(world.gather(group, x)), len(group))[world.place(group)]

    return {
        "AlltoAll": all_to_all,
        "AlltoAllV": all_to_all_v,
        "AllGather": lambda group: lambda x: np.concatenate(world.gather(group, x)),
        "AllReduce": lambda group: lambda x: sum(world.gather(group, x)),
        "ReduceScatter": reduce_scatter,
    }


def softmax(axis):
    def function(x):
        exps = np.exp(x - x.max(axis, keepdims=True))
        return exps / exps.sum(axis, keepdims=True)

    return function


def scatter_update(x, indices, values):
    x = x.copy()
    x[indices[:, 0]] = values
    return x


def matmul(transpose_b=False):
    return lambda a, b: a @ (b.swapaxes(-1, -2) if transpose_b else b)


def array(value, dtype=None) -> np.ndarray:
    """In place of a Tensor."""
    value = np.asarray(value, DTYPES.get(dtype))
    return value.astype(np.float64) if value.dtype == np.float32 else value


# What a primitive computes; those with arguments of their own are below.
FUNCTIONS = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Maximum": np.maximum,
    "Minimum": np.minimum, "Less": np.less, "Equal": np.equal, "GreaterEqual": np.greater_equal,
    "FloorDiv": np.floor_divide, "FloorMod": np.mod, "Select": np.where, "ReduceMax": np.max,
    "Reshape": np.reshape, "Transpose": np.transpose, "OnesLike": np.ones_like, "ZerosLike": np.zeros_like,
    "Gather": np.take, "TensorScatterUpdate": scatter_update, "Zeros": np.zeros,
    "Range": lambda first, end, step: np.arange(first, end, step),
    "CumSum": lambda x, axis: np.cumsum(x, axis, dtype=x.dtype),
    "Cast": lambda x, dtype: np.asarray(x).astype(DTYPES.get(dtype, dtype)),
    "FillV2": lambda shape, value: np.full(shape, value, value.dtype),
    "StridedSlice": lambda x, first, end, steps: x[tuple(map(slice, first, end, steps))],
    "MoveTo": lambda x, place, blocking: x,
}  # fmt: skip
FACTORIES = {
    "Concat": lambda axis: lambda arrays: np.concatenate(arrays, axis),
    "Stack": lambda: np.stack,
    "Softmax": softmax,
    "MatMul": matmul,
    "BatchMatMul": matmul,
    "ReduceMean": lambda: np.mean,
    "ReduceSum": lambda keep_dims=False: (
        lambda x, axis=None: np.sum(x, axis, dtype=x.dtype, keepdims=keep_dims)
    ),
}


def permute(x, experts):
    """MoeTokenPermute by its description: tokens in the order of their experts, and each choice's row."""
    experts = experts.reshape(len(x), -1)
    order = np.argsort(experts.reshape(-1), kind="stable")
    return x[order // experts.shape[1]], np.argsort(order, kind="stable").astype(np.int32)


def unpermute(rows, order, gates):
    """MoeTokenUnpermute by its description: each token's rows times its gates, added up."""
    rows = rows[order]
    return rows if gates is None else (rows.reshape(*gates.shape, -1) * gates[..., None]).sum(1)


def grouped_matmul(split_item, group_type):
    """GroupedMatmul by its description: group_type 0 groups the rows of the result, 2 the summed axis."""
    assert split_item == 3

    def function(x, weight, *nothing):
        (x,), (weight,), ends = x, weight, nothing[-1]
        assert nothing[:-1] == (None,) * 5 and ends.dtype == np.int64
        assert ends[-1] == (len(x) if group_type == 0 else x.shape[1])
        cuts = ends[:-1]
        if group_type == 0:
            assert len(weight) == len(ends)
            groups = zip(np.split(x, cuts), weight, strict=True)
            return [np.concatenate([rows @ expert for rows, expert in groups])]
        groups = zip(np.split(x, cuts, axis=1), np.split(weight, cuts), strict=True)
        return [np.stack([left @ right for left, right in groups])]

    return function


ASCEND = SimpleNamespace(
    MoeTokenPermute=lambda: permute,
    MoeTokenUnpermute=lambda: unpermute,
    GroupedMatmul=grouped_matmul,
    TransposeExtView=lambda: np.swapaxes,
)


def swiglu(gate, up):
    """In place of a SwiGLU kernel."""
    return gate / (1 + np.exp(-gate)) * up


@contextlib.contextmanager
def numpy_cells(world: World):
    """Cells of the mixture of experts that are built here compute with NumPy on the world's ranks."""
    functions = {name: lambda function=function: function for name, function in FUNCTIONS.items()}
    primitives = SimpleNamespace(**functions, **FACTORIES, **collectives(world))
    region = parallel_experts
    with contextlib.ExitStack() as patches:
        for module in (moe, moe_router, moe_dispatch, region, ascend):
            patches.enter_context(mock.patch.object(module, "P", primitives))
            if hasattr(module, "Tensor"):
                patches.enter_context(mock.patch.object(module, "Tensor", array))
            if hasattr(module, "auto_generate"):
                patches.enter_context(mock.patch.object(module, "auto_generate", ASCEND))
        patches.enter_context(mock.patch.object(region, "_group", tuple))
        patches.enter_context(
            mock.patch.object(moe_router, "ops", SimpleNamespace(stop_gradient=lambda x: x))
        )
        patches.enter_context(
            mock.patch.object(nn.Cell, "__call__", lambda cell, *inputs: cell.construct(*inputs))
        )
        yield
