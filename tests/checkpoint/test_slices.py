"""What a rank of a training cluster reads of a whole model: NumPy's slices, by MindSpore's layouts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import write_hf_folder
from rank_arrays import bits_of, whole_model
from refusal import refused
from sharding import cut

from research.telechat2.checkpoint.cluster.strategies import own_slices
from research.telechat2.checkpoint.storage.tensor import StoredTensor, blocks_of

HERE = Path(__file__).resolve().parent
SIZES = {
    "hidden_size": 64, "n_layer": 2, "n_head": 4, "num_key_value_heads": 2, "ffn_hidden_size": 96,
    "vocab_size": 128,
}  # fmt: skip
MODEL = {
    "seq_length": 32, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2,
    "intermediate_size": 96, "vocab_size": 128,
}  # fmt: skip
EXPERTS = {
    "expert_num": 8, "num_experts_chosen": 2, "capacity_factor": 1.2, "routing_policy": "TopkRouterV2",
    "aux_loss_types": ["expert"], "aux_loss_factors": [0.01],
}  # fmt: skip


def in_memory(array: np.ndarray) -> StoredTensor:
    def blocks(start=0, stop=None):
        return blocks_of(array, start, stop)

    return StoredTensor("weight", "float32", array.shape, Path("memory"), blocks)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_slices_are_numpy_s(data):
    """Any device matrix and map, with and without a share for the optimizer, for every rank."""
    matrix = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3))
    free = data.draw(st.permutations(range(len(matrix))))
    rank_of_tensor = data.draw(st.integers(1, min(3, len(matrix))))
    tensor_map = [axis if data.draw(st.booleans()) else -1 for axis in free[:rank_of_tensor]]
    axes = tuple(() if axis == -1 else (axis,) for axis in tensor_map)
    copies = math.prod(matrix) // math.prod(matrix[-1 - axis] for axis in tensor_map if axis != -1)
    parts = data.draw(st.sampled_from([0, copies])) if copies > 1 else 0
    shape = tuple(64 if axis == 0 else 4 for axis in range(rank_of_tensor))
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    layout = (matrix, tensor_map, [], 0, True, "group" if parts else "", list(shape))
    stages = data.draw(st.integers(1, 2))
    size = math.prod(matrix)
    same = {}
    for rank in range(size):
        same.setdefault(cut(array, (tuple(matrix), axes, 0), rank).tobytes(), []).append(rank)
    for rank in range(size):
        mine = next(ranks for ranks in same.values() if rank in ranks)
        place = (mine.index(rank), len(mine))
        found = own_slices(
            {"w": in_memory(array)}, {"w": layout, "state": layout}, rank + size * (stages - 1),
            lambda group, place=place: place,
        )  # fmt: skip
        expected = cut(array, (tuple(matrix), axes, parts), rank)
        assert found.keys() == {"w"} and found["w"].shape == expected.shape
        assert bytes(found["w"].read("float32")) == expected.tobytes()


def test_a_layout_of_another_shape_is_refused():
    layout = ([2], [0, -1], [4, 4], 0, True, "", [8, 4])
    with refused([6, 4], [8, 4]):
        own_slices({"w": in_memory(np.zeros((6, 4), np.float32))}, {"w": layout}, 0, lambda _: (0, 1))


PLANS = {
    "dense, optimizer sharded": ({"data_parallel": 4, "model_parallel": 2}, 5),
    "dense, second stage": (
        {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2}, 6
    ),
    "experts": ({"data_parallel": 4, "model_parallel": 2, "expert_parallel": 2}, 3),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_compiled_rank_loads_its_slices_of_a_hugging_face_folder(tmp_path, plan):
    from research.telechat2.plan.dry_run.cann_stub import ascend_environment

    parallel_config, rank = PLANS[plan]
    experts = "expert_parallel" in parallel_config
    stages = parallel_config.get("pipeline_stage", 1)
    write_hf_folder(tmp_path / "hf", SIZES | ({"num_experts": 8} if experts else {}), seed=3)
    config = MODEL | {"parallel_config": {"use_seq_parallel": True, "vocab_emb_dp": False} | parallel_config}
    request = {
        "device_num": 8,
        "rank": rank,
        "parallel": {
            "pipeline_stages": stages,
            "enable_parallel_optimizer": True,
            "parallel_optimizer_config": {"parallel_optimizer_threshold": 0},
        },
        "config": config | ({"moe_config": EXPERTS} if experts else {}),
        "source": str(tmp_path / "hf"),
        "import_path": [str(HERE), str(HERE.parent), str(HERE.parents[1])],
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    with open(tmp_path / "log.txt", "w") as log:
        subprocess.run(
            [sys.executable, str(HERE / "load_process.py"), str(tmp_path)], cwd=tmp_path,
            env=ascend_environment(8, rank), stdout=log, stderr=log, timeout=600, check=True,
        )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    found = dict(np.load(tmp_path / "slices.npz"))
    model = whole_model(bits_of(tmp_path / "hf"), 8 if experts else 0)
    layers = {name.split(".")[2] for name in found if ".layers." in name}
    assert layers == ({"1"} if stages == 2 else {"0", "1"})  # this rank's stage, all of it and no other
    assert found.keys() == {
        name
        for name in model
        if stages == 1 or ".layers.1." in name or name in ("model.norm_out.weight", "lm_head.weight")
    }
    sliced = 0
    for name, array in found.items():
        matrix, tensor_map, group = result["layouts"][name]
        axes = tuple(() if axis == -1 else (axis,) for axis in tensor_map)
        parts = result["groups"][group][1] if group else 0
        expected = cut(model[name], (tuple(matrix), axes, parts), rank % (8 // stages))
        assert array.shape == expected.shape and array.tobytes() == expected.tobytes(), name
        sliced += expected.size < model[name].size
    assert sliced > len(found) // 3
