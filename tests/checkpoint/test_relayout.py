"""Conversions to the layouts of parallel inference and back: every bit, every header, every refusal."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import stored_tensors, write_hf_folder
from rank_arrays import bits_of, joined_for, rank_of, whole_model
from refusal import refused
from relatives_fixtures import llama_folder

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.convert_layout import check_model_name, convert_layout
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.storage.safetensors_format import read_metadata

CHECKOUT = Path(__file__).resolve().parents[2]
EXPERTS = 4
MODELS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"n_head": 8, "num_key_value_heads": 4, "ffn_hidden_size": 88},
    "experts": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
}
KV_HEADS = 4
LAYOUTS = [(1, True), (2, False), (2, True), (4, False), (4, True)]  # ranks, qkv_concat
CASES = [("bfloat16", *layout) for layout in LAYOUTS] + [("float32", 4, True), ("float16", 2, True)]


def write(folder: Path, kind: str, dtype: str = "float32", **more) -> dict[str, np.ndarray]:
    """A random model in ``folder/hf``; the bits of its parameters."""
    write_hf_folder(folder / "hf", MODELS[kind], seed=2, dtype=dtype, shards=2, **more)
    return whole_model(bits_of(folder / "hf"), EXPERTS if kind == "experts" else 0)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape and found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("dtype", "n", "qkv_concat"), CASES)
def test_ranks_are_written_and_merged_again(tmp_path, kind, dtype, n, qkv_concat):
    model = write(tmp_path, kind, dtype, tied=kind == "gqa")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"vocabulary")
    done = convert_layout(tmp_path / "hf", tmp_path / "ranks", qkv_concat=qkv_concat, tensor_parallel=n)
    recorded = {"format": "ms", "tensor_parallel": str(n)} | ({"qkv_concat": str(n)} if qkv_concat else {})
    files = [tmp_path / "ranks" / f"rank_{rank}" / f"checkpoint_{rank}.safetensors" for rank in range(n)]
    assert sorted((tmp_path / "ranks").rglob("*.safetensors")) == files == list(done.files)
    for rank, file in enumerate(files):
        assert_same(bits_of(file), rank_of(model, n, rank, KV_HEADS, qkv_concat))
        assert read_metadata(file) == recorded
    assert done.verified and done.ignored == {}
    assert (tmp_path / "ranks" / "tokenizer.model").read_bytes() == b"vocabulary"

    convert_to_torch(tmp_path / "ranks", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_one_file_of_joined_rows_and_back(tmp_path, kind, n):
    model = write(tmp_path, kind, "bfloat16")
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "joined.safetensors"
    convert_layout(tmp_path / "hf", file, qkv_concat=True, tensor_parallel=n)
    assert_same(bits_of(file), joined_for(model, n, KV_HEADS))
    assert read_metadata(file) == {"format": "ms", "qkv_concat": str(n)}
    (tmp_path / "out" / "joined.safetensors.config.json").rename(tmp_path / "aside.json")
    with refused(file, "qkv_concat", "config.json"):
        convert_to_torch(file, tmp_path / "back")
    (tmp_path / "aside.json").rename(tmp_path / "out" / "config.json")
    convert_to_torch(file, tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


@pytest.mark.parametrize("kind", MODELS)
def test_ranks_of_one_number_become_those_of_another(tmp_path, kind):
    """4 joined -> 2 not joined -> 4 joined: the files of the first again, without a whole one in between."""
    write(tmp_path, kind)
    convert_layout(tmp_path / "hf", tmp_path / "four", qkv_concat=True, tensor_parallel=4)
    convert_layout(tmp_path / "four", tmp_path / "two", qkv_concat=False, tensor_parallel=2)
    convert_layout(tmp_path / "two", tmp_path / "again", qkv_concat=True, tensor_parallel=4)
    for rank in range(4):
        part = f"rank_{rank}/checkpoint_{rank}.safetensors"
        assert (tmp_path / "four" / part).read_bytes() == (tmp_path / "again" / part).read_bytes()


def test_ranks_stay_ranks_where_no_number_is_given(tmp_path):
    """The README's form for a folder of rank_*: each rank's rows are joined."""
    model = write(tmp_path, "gqa")
    convert_layout(tmp_path / "hf", tmp_path / "ranks", qkv_concat=False, tensor_parallel=2)
    convert_layout(tmp_path / "ranks", tmp_path / "joined", qkv_concat=True)
    for rank in range(2):
        file = tmp_path / "joined" / f"rank_{rank}" / f"checkpoint_{rank}.safetensors"
        assert_same(bits_of(file), rank_of(model, 2, rank, KV_HEADS, True))
    convert_layout(tmp_path / "ranks", tmp_path / "whole.safetensors", qkv_concat=False)
    assert_same(bits_of(tmp_path / "whole.safetensors"), model)


def test_casts_on_the_way(tmp_path):
    write(tmp_path, "gqa", "bfloat16")
    convert_layout(tmp_path / "hf", tmp_path / "ranks", qkv_concat=True, tensor_parallel=2, dtype="float32")
    convert_to_torch(tmp_path / "ranks", tmp_path / "back", dtype="bfloat16")
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")


def run(*words: object) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(CHECKOUT / "research" / "telechat2" / "convert_weight.py"),
        *map(str, words),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_readme_s_command(tmp_path, monkeypatch, capsys):
    """A .ckpt file to a .ckpt file, as published; sizes from config.json, the name only checked."""
    import mindspore

    monkeypatch.setattr(sys, "path", list(sys.path))
    from research.telechat2 import convert_weight

    def command(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["convert_weight.py", *words])
        convert_weight.main()

    model = write(tmp_path, "gqa")
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms", ckpt_format="ckpt")
    words = ["--qkv_concat=True", f"--pre_ckpt_path={tmp_path}/ms/model.ckpt"]
    words += [f"--mindspore_ckpt_path={tmp_path}/qkv.ckpt"]
    with refused("telechat_7B", "30 layers", "2 layers"):
        command("--model_name=telechat_7B", *words)
    assert not (tmp_path / "qkv.ckpt").exists()
    command(*words)
    assert "stored for 1 rank" in capsys.readouterr().out
    found = {
        name: parameter.asnumpy().view(np.uint32)
        for name, parameter in mindspore.load_checkpoint(str(tmp_path / "qkv.ckpt")).items()
    }
    assert_same(found, joined_for(model, 1, KV_HEADS))


def test_dry_run_and_usage(tmp_path):
    write(tmp_path, "gqa")
    table = run("--torch_path", tmp_path / "hf", "--mindspore_path", tmp_path / "new", "--tensor_parallel", 2,
                "--qkv_concat", "True", "--dry_run")  # fmt: skip
    assert table.returncode == 0, table.stderr
    assert "rank_1/checkpoint_1.safetensors: " in table.stdout
    assert "model.layers.1.attention.w_qkv.weight  64x64  float32  16,384" in table.stdout
    assert not (tmp_path / "new").exists()
    for words, said in (
        (["--torch_path", "a", "--pre_ckpt_path", "b", "--mindspore_path", "c"], "not allowed with"),
        (["--mindspore_path", "c"], "one of the arguments --torch_path --pre_ckpt_path is required"),
        (["--torch_path", "a", "--mindspore_path", "c", "--model_name", "x"], "--model_name only goes with"),
        (["--torch_path", "a", "--mindspore_path", "c", "--qkv_concat", "yes"], "expected True or False"),
    ):
        wrong = run(*words)
        assert wrong.returncode == 2 and said in wrong.stderr


def test_names_of_the_releases():
    """Layers, hidden and expert numbers from the releases' configs."""
    seven = TelechatSizes(30, 4096, 12288, 131072, 4096, num_experts=0)
    check_model_name("telechat_7B", seven)
    check_model_name("telechat_115B", TelechatSizes(96, 8192, 40960, 131072, 1024))
    check_model_name("telechat_39B_A12B", TelechatSizes(30, 4096, 6144, 131072, 4096, num_experts=16))
    with refused("telechat_39B_A12B", "30 layers", "16 experts"):
        check_model_name("telechat_39B_A12B", seven)
    with refused("telechat_8B", "telechat_3B", "telechat_7B"):
        check_model_name("telechat_8B", seven)


@pytest.mark.parametrize(
    ("target", "arguments", "values"),
    [
        ("new", {"tensor_parallel": 3}, ["heads 8", "key/value heads 4"]),
        ("new", {"tensor_parallel": 0}, ["tensor parallel", 0]),
        ("new.safetensors", {"tensor_parallel": 0}, ["tensor parallel", 0]),
        ("hf", {"tensor_parallel": 2}, ["hf"]),
        (
            "x.safetensors",
            {"tensor_parallel": 2, "qkv_concat": False},
            ["x.safetensors", "--qkv_concat True", "--tensor_parallel"],
        ),
        ("x.ckpt", {"tensor_parallel": 2}, ["x.ckpt", "2 ranks", ".safetensors"]),
        ("there", {"tensor_parallel": 2}, ["there", "rank_1"]),
        ("new", {"tensor_parallel": 2, "max_shard_size": 10**9}, ["--max_shard_size"]),
        ("new", {"tensor_parallel": 2, "dtype": "int8"}, ["int8", "bfloat16"]),
        ("", {"tensor_parallel": 2}, []),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, target, arguments, values):
    write(tmp_path, "gqa")
    (tmp_path / "there" / "rank_1").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    path = tmp_path / target if target else ""
    with refused(*values):
        convert_layout(tmp_path / "hf", path, **{"qkv_concat": True} | arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_rank_that_is_absent_is_named(tmp_path):
    write(tmp_path, "gqa")
    convert_layout(tmp_path / "hf", tmp_path / "ranks", qkv_concat=False, tensor_parallel=2)
    (tmp_path / "ranks" / "rank_1").rename(tmp_path / "ranks" / "rank_2")
    with refused(tmp_path / "ranks", "rank_0", "rank_1", "rank_2") as said:
        convert_to_torch(tmp_path / "ranks", tmp_path / "back")
    assert "strateg" not in str(said.value)


def test_the_yamls_of_an_imported_llama_go_along(tmp_path):
    llama_folder(tmp_path / "llama")
    convert_to_mindspore(tmp_path / "llama", tmp_path / "ms")
    done = convert_layout(tmp_path / "ms", tmp_path / "ranks", qkv_concat=True, tensor_parallel=2)
    assert "predict.yaml and finetune.yaml of the input: copied unchanged" in str(done)
    for name in ("predict.yaml", "finetune.yaml"):
        assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "ms" / name).read_bytes()


def test_joining_without_a_config_needs_the_heads(tmp_path):
    write(tmp_path, "gqa")
    (tmp_path / "hf" / "config.json").unlink()
    for arguments in ({"qkv_concat": True}, {"qkv_concat": False, "tensor_parallel": 2}):
        with refused("config.json", "--model_name"):
            convert_layout(tmp_path / "hf", tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_manifest_says_the_layout(tmp_path):
    write(tmp_path, "experts")
    convert_layout(tmp_path / "hf", tmp_path / "ranks", qkv_concat=True, tensor_parallel=2)
    manifest = json.loads((tmp_path / "ranks" / "manifest.json").read_text())
    assert manifest["options"]["layout"] == {"qkv_concat": "2", "tensor_parallel": "2"}
    assert sorted(manifest["files"]) == [f"rank_{rank}/checkpoint_{rank}.safetensors" for rank in (0, 1)]
