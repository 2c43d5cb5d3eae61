"""Sharded checkpoints for tests: slices by NumPy, files by safetensors, strategies by MindSpore's schema."""

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.table import expand

COUNTERS = {"global_step": np.array([7], np.int32), "scale_sense": np.array(1.0, np.float32)}


def model_tensors(seed: int = 0, num_layers: int = 2, experts: int = 0, length: int = 16) -> dict:
    """Weights and one state of each, of a model all of whose sizes are multiples of ``length``."""
    sizes = TelechatSizes(
        num_layers, length, 2 * length, 3 * length, length, tie_word_embeddings=False, num_experts=experts
    )
    rng = np.random.default_rng(seed)
    shapes = {weight.mindspore: weight.shape for weight in expand(sizes)}
    shapes |= {f"adam_m.{name}": shape for name, shape in shapes.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def cut(array: np.ndarray, layout: tuple, rank: int) -> np.ndarray:
    """What a rank of a stage stores; ``layout`` is (device matrix, map of each axis, optimizer parts)."""
    matrix, axes, optimizer_parts = layout

    def place_of(rank: int) -> list[tuple[int, int]]:
        coordinates = np.unravel_index(rank, matrix)
        places = []
        for splits in axes:
            sizes = [matrix[-1 - split] for split in splits]
            own = [int(coordinates[-1 - split]) for split in splits]
            places.append((int(np.ravel_multi_index(own, sizes)) if splits else 0, math.prod(sizes)))
        return places

    place = place_of(rank)
    for axis, (index, parts) in enumerate(place):
        array = np.split(array, parts, axis)[index]
    if optimizer_parts:
        same = [other for other in range(math.prod(matrix)) if place_of(other) == place]
        parts = len(same) if optimizer_parts == -1 else optimizer_parts
        array = np.split(array, parts)[same.index(rank) % parts]
    return np.ascontiguousarray(array)


def stored_by(whole: dict, stages: list[dict], rank: int) -> dict:
    """The tensors of a rank: its stage's slices, and the counters."""
    size = math.prod(next(iter(stages[0].values()))[0])
    layouts = stages[rank // size]
    return {name: cut(whole[name], layout, rank % size) for name, layout in layouts.items()} | COUNTERS


def write_shards(folder: Path, whole: dict, stages: list[dict], step: str = "1_10") -> Path:
    """``rank_*/telechat_rank_*-<step>.safetensors``, as CheckpointMonitor names them."""
    size = math.prod(next(iter(stages[0].values()))[0])
    for rank in range(size * len(stages)):
        file = folder / f"rank_{rank}" / f"telechat_rank_{rank}-{step}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored_by(whole, stages, rank), file, metadata={"format": "ms"})
    return folder


def write_strategies(folder: Path, stages: list[dict]) -> Path:
    """One strategy file for each stage, as the dry run leaves them."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    folder.mkdir(parents=True)
    size = math.prod(next(iter(stages[0].values()))[0])
    for number, layouts in enumerate(stages):
        strategy = ParallelStrategyMap(current_stage=1)
        item = strategy.parallel_strategy_item.add(node_name="MatMul")
        item.parallel_strategys.stage = number
        for name, (matrix, axes, optimizer_parts) in layouts.items():
            stored = strategy.parallel_layout_item.add(param_name=name).parallel_layouts
            stored.dev_matrix.add(dim=matrix)
            entries = [list(splits) or [-1] for splits in axes]
            if any(len(entry) > 1 for entry in entries):
                for entry in entries:
                    stored.tensor_map.add(dim=entry)
            else:
                stored.tensor_map.add(dim=[entry[0] for entry in entries])
            stored.field, stored.opt_weight_shard_step = 0, 1 if optimizer_parts else 0
            stored.opt_weight_shard_size = optimizer_parts
        file = folder / f"ckpt_strategy_rank_{number * size}.ckpt"
        file.write_bytes(strategy.SerializeToString())
    return folder


def assert_same(found: dict, expected: dict) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
