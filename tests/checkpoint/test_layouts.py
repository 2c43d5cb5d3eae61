"""Every layout read for every rank: against NumPy's splits of the release's tensors, bit by bit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import write_hf_folder
from rank_arrays import bits_of, joined_for, rank_of, save, save_ranks, whole_model
from refusal import refused

from research.telechat2.checkpoint.layouts import read as rank_layout
from research.telechat2.checkpoint.layouts.read import read_whole, weights_of_rank, whole_weights
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.storage import views
from research.telechat2.checkpoint.storage.tensor import StoredTensor, blocks_of
from research.telechat2.checkpoint.storage.views import glue, part_of, rows_of

EXPERTS = 4
MODELS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"n_head": 8, "num_key_value_heads": 4, "ffn_hidden_size": 88},
    "experts": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
}
LAYOUTS = [(qkv_concat, n) for qkv_concat in (False, True) for n in (1, 2, 4)]


class Checkpoint:
    """One random model as an HF folder, and its arrays and sizes."""

    def __init__(self, folder: Path, kind: str, dtype: str = "float32", tied: bool = False):
        self.folder, self.dtype, self.hf = folder, dtype, folder / "hf"
        write_hf_folder(self.hf, MODELS[kind], seed=1, dtype=dtype, shards=2, tied=tied)
        self.arrays = whole_model(bits_of(self.hf), EXPERTS if kind == "experts" else 0)
        self.sizes = TelechatSizes.from_hf_config(json.loads((self.hf / "config.json").read_text()))
        self.kv_heads = self.sizes.n_kv_heads

    def joined(self, n: int) -> Path:
        arrays = joined_for(self.arrays, n, self.kv_heads)
        return save(self.folder / f"joined_{n}.safetensors", arrays, self.dtype, qkv_concat=str(n))

    def ranks(self, n: int, qkv_concat: bool) -> Path:
        folder = self.folder / f"ranks_{n}_{qkv_concat}"
        return save_ranks(folder, self.arrays, n, self.kv_heads, qkv_concat, self.dtype)

    def assert_ranks(self, path: Path, tensor_parallel: int, qkv_concat: bool) -> None:
        """Every rank reads from ``path`` what it should."""
        for rank in range(tensor_parallel):
            found = weights_of_rank(
                path, self.sizes, tensor_parallel=tensor_parallel, rank=rank, qkv_concat=qkv_concat
            )
            expected = rank_of(self.arrays, tensor_parallel, rank, self.kv_heads, qkv_concat)
            assert found.keys() == expected.keys()
            for name, array in expected.items():
                assert (found[name].dtype, found[name].shape) == (self.dtype, array.shape), name
                assert bytes(found[name].read(self.dtype)) == array.tobytes(), name


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(("qkv_concat", "n"), LAYOUTS)
def test_every_rank_reads_its_part_of_a_hugging_face_folder(checkpoint, n, qkv_concat):
    checkpoint.assert_ranks(checkpoint.hf, n, qkv_concat)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bits_of_narrow_dtypes_are_kept(tmp_path, dtype):
    narrow = Checkpoint(tmp_path, "gqa", dtype, tied=True)
    for qkv_concat, n in LAYOUTS:
        narrow.assert_ranks(narrow.hf, n, qkv_concat)
    narrow.assert_ranks(narrow.ranks(2, True), 4, False)


@pytest.mark.parametrize("source_n", [1, 2, 4])
@pytest.mark.parametrize(("qkv_concat", "n"), LAYOUTS)
def test_joined_and_cut_checkpoints_are_cut_anew(checkpoint, source_n, qkv_concat, n):
    for path in (
        checkpoint.joined(source_n),
        checkpoint.ranks(source_n, True),
        checkpoint.ranks(source_n, False),
    ):
        checkpoint.assert_ranks(path, n, qkv_concat)


def test_ranks_in_ckpt_files_of_an_older_converter(tmp_path, capsys):
    """Per-rank .ckpt files with joined rows, as MindFormers' convert_weight.py leaves them: no record."""
    import mindspore as ms

    model = Checkpoint(tmp_path, "gqa")
    for rank in range(2):
        held = rank_of(model.arrays, 2, rank, model.kv_heads, True)
        (tmp_path / "old" / f"rank_{rank}").mkdir(parents=True)
        parameters = [
            {"name": name, "data": ms.Tensor(np.ascontiguousarray(array).view(np.float32))}
            for name, array in held.items()
        ]
        ms.save_checkpoint(parameters, str(tmp_path / "old" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"))
    model.assert_ranks(tmp_path / "old", 1, False)
    assert "tensor-parallel size 2" in capsys.readouterr().err


def test_a_rank_of_the_same_group_reads_its_own_folder_only(checkpoint):
    folder = checkpoint.ranks(4, True)
    found = weights_of_rank(folder, checkpoint.sizes, tensor_parallel=4, rank=2, qkv_concat=True)
    whole_on_all = {name for name, array in checkpoint.arrays.items() if name in found
                    and found[name].shape == array.shape}  # fmt: skip
    assert {found[name].file.parent.name for name in found.keys() - whole_on_all} == {"rank_2"}
    assert {type(found[name].blocks).__name__ for name in found} == {"partial"}  # nothing is rearranged


class TestRefusals:
    """What would load wrongly, or not at all."""

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory) -> Checkpoint:
        return Checkpoint(tmp_path_factory.mktemp("refused"), "gqa")

    def read(self, model, path, n=2, rank=0, qkv_concat=True, **sizes):
        changed = dataclasses.replace(model.sizes, **sizes)
        return weights_of_rank(path, changed, tensor_parallel=n, rank=rank, qkv_concat=qkv_concat)

    @pytest.mark.parametrize(
        ("n", "values"),
        [
            (3, ["heads 8", "key/value heads 4", "feed-forward size 88", "vocabulary 128"]),
            (8, ["key/value heads 4"]),
            (0, []),
        ],
    )
    def test_parts_that_are_not_equal(self, model, n, values):
        with refused("tensor parallel", n, *values):
            self.read(model, model.hf, n)

    def test_a_missing_rank(self, model, tmp_path):
        folder = save_ranks(tmp_path, model.arrays, 4, model.kv_heads, False, "float32")
        (folder / "rank_3" / "checkpoint_3.safetensors").unlink()
        (folder / "rank_3").rmdir()
        with refused(folder, 3, 4, "rank_3"):
            self.read(model, folder)
        with refused("checkpoint_0.safetensors", 1, 4, "rank_3"):
            self.read(model, folder / "rank_0" / "checkpoint_0.safetensors")

    @pytest.mark.parametrize("lost", ["model.norm_out.weight", "model.layers.1.attention.w_qkv.weight"])
    def test_a_tensor_that_a_rank_lacks(self, model, tmp_path, lost):
        folder = save_ranks(tmp_path, model.arrays, 2, model.kv_heads, True, "float32")
        held = rank_of(model.arrays, 2, 1, model.kv_heads, True)
        del held[lost]
        save(
            folder / "rank_1" / "checkpoint_1.safetensors",
            held,
            "float32",
            tensor_parallel="2",
            qkv_concat="2",
        )
        with refused("rank 1", lost):
            self.read(model, folder)

    def test_ranks_of_two_checkpoints(self, model, tmp_path):
        folder = save_ranks(tmp_path, model.arrays, 2, model.kv_heads, True, "float32")
        held = rank_of(model.arrays, 2, 1, model.kv_heads, True)
        name = "model.layers.0.attention.wo.bias"
        save(folder / "rank_1" / "checkpoint_1.safetensors", held | {name: held[name] + 1}, "float32",
             tensor_parallel="2", qkv_concat="2")  # fmt: skip
        with pytest.raises(
            ValueError, match=f"hold different values of {name}, of which every rank has a copy"
        ):
            self.read(model, folder)
        save(
            folder / "rank_1" / "checkpoint_1.safetensors",
            held,
            "float32",
            tensor_parallel="2",
            qkv_concat="4",
        )
        with refused("checkpoint_0.safetensors", "checkpoint_1.safetensors"):
            self.read(model, folder)

    def test_rows_joined_for_more_ranks_than_it_says(self, model, tmp_path):
        """Rows of 4 ranks are as many as those of 1: only the record tells them apart."""
        arrays = joined_for(model.arrays, 4, model.kv_heads)
        right = save(tmp_path / "right.safetensors", arrays, "float32", qkv_concat="4")
        model.assert_ranks(right, 1, True)
        for value in ("0", "four", ""):
            wrong = save(tmp_path / f"wrong{value}.safetensors", arrays, "float32", qkv_concat=value)
            with refused(wrong, "qkv_concat"):
                self.read(model, wrong)

    def test_no_record_needs_the_users_word(self, model, tmp_path, monkeypatch):
        file = save(tmp_path / "old.safetensors", joined_for(model.arrays, 1, model.kv_heads), "float32")
        with refused(file, "qkv_concat", "--joined_for N"):
            self.read(model, file)
        monkeypatch.setattr(rank_layout, "_ASKED", {"joined_for": 1})
        model.assert_ranks(file, 2, True)

    def test_joined_rows_without_the_number_of_heads(self, model):
        with refused("qkv_concat", "config.json"):
            whole_weights(model.joined(2))
        with refused("config.json", "--model_name"):
            self.read(model, model.joined(2), num_heads=None)

    def test_another_model(self, model):
        with refused("w_qkv.weight [128, 64]", "[96, 64]"):
            self.read(model, model.joined(2), n_kv_heads=2, kv_size=16)
        for changes in ({"num_layers": 3}, {"intermediate_size": 44}, {"num_experts": 4}):
            with refused(*changes):
                self.read(model, model.hf, **changes)

    def test_data_parallel_copies_are_no_slices(self, model, tmp_path):
        for rank in range(2):
            save(tmp_path / f"rank_{rank}" / f"t_rank_{rank}-1_5.safetensors", model.arrays, "float32")
        with refused("misshapen", "rank_0", "transform_ckpt.py"):
            self.read(model, tmp_path)

    def test_joining_rows_of_different_dtypes(self, model, tmp_path):
        folder = tmp_path / "mixed"
        keys = [name for name in model.arrays if name.endswith("attention.wk_v.weight")]
        narrow = {name: model.arrays[name].astype(np.uint16) for name in keys}
        save(folder / "a.safetensors", narrow, "bfloat16")
        rest = {name: array for name, array in model.arrays.items() if name not in keys}
        save(folder / "b.safetensors", rest, "float32")
        with refused("float16", "float32"):
            self.read(model, folder)
        assert len(self.read(model, folder, qkv_concat=False)) == len(model.arrays)


def test_what_is_no_weight_is_left_out_of_ranks(tmp_path):
    model = Checkpoint(tmp_path, "mha")
    for rank in range(2):
        held = rank_of(model.arrays, 2, rank, 4, False)
        state = {f"adam_m.{name}": array + rank for name, array in held.items()}
        save(tmp_path / "ranks" / f"rank_{rank}" / f"t_rank_{rank}-1_5.safetensors", held | state, "float32")
    model.assert_ranks(tmp_path / "ranks", 1, False)
    assert len(read_whole(tmp_path / "ranks", model.sizes)) == 2 * len(model.arrays)


def in_memory(array: np.ndarray) -> StoredTensor:
    def blocks(start=0, stop=None):
        return blocks_of(array, start, stop)

    return StoredTensor("t", "float32", array.shape, Path("memory"), blocks)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_arrangements_are_numpy_s_slices(data):
    """Random slices of slices glued anew, by runs and by rows, whole and in part."""
    shape = tuple(data.draw(st.lists(st.sampled_from([2, 4, 6, 12]), min_size=1, max_size=3)))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    tensor, expected = in_memory(array), array
    for _ in range(data.draw(st.integers(1, 4))):
        axis = data.draw(st.integers(0, len(shape) - 1))
        parts = data.draw(st.sampled_from([p for p in (1, 2, 3, 4) if expected.shape[axis] % p == 0]))
        index = data.draw(st.integers(0, parts - 1))
        if data.draw(st.booleans()):
            tensor, expected = part_of(tensor, axis, index, parts), np.split(expected, parts, axis)[index]
        else:
            pieces = data.draw(st.permutations(range(parts)))
            tensor = glue([part_of(tensor, axis, i, parts) for i in pieces], axis)
            expected = np.concatenate([np.split(expected, parts, axis)[i] for i in pieces], axis)
        if data.draw(st.booleans()) and expected.shape[0] > 1:
            row = data.draw(st.integers(1, expected.shape[0] - 1))
            end = expected.shape[0]
            tensor = rows_of([(tensor, row, end), (tensor, 0, row)], "t", expected.shape)
            expected = np.concatenate([expected[row:], expected[:row]])
    content = expected.tobytes()
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.one_of(st.none(), st.integers(0, len(content) + 8)))
    long_run, block_bytes = data.draw(st.sampled_from([(1, 1 << 20), (1 << 20, 1 << 20), (1 << 20, 40)]))
    before = views.LONG_RUN, views.BLOCK_BYTES
    views.LONG_RUN, views.BLOCK_BYTES = long_run, block_bytes
    try:
        assert tensor.shape == expected.shape
        assert b"".join(map(bytes, tensor.blocks(start, stop))) == content[start:stop]
    finally:
        views.LONG_RUN, views.BLOCK_BYTES = before
