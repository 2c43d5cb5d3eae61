"""What a conversion says of itself: table, manifest, counts; what its verification finds; its memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import stored_tensors, write_hf_folder
from refusal import refused
from safetensors.numpy import load_file, save_file
from test_plan_115b import described, hf_shapes

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.job import copy, run
from research.telechat2.checkpoint.job.job import Job
from research.telechat2.checkpoint.job.manifest import table
from research.telechat2.checkpoint.plan import make_plan
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.storage.safetensors_format import read_metadata
from research.telechat2.checkpoint.storage.tensor import StoredTensor

CHECKOUT = Path(__file__).resolve().parents[2]
SIZES = {"num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "ffn_hidden_size": 40}


@pytest.fixture
def hf(tmp_path):
    write_hf_folder(tmp_path / "hf", SIZES, seed=1, dtype="bfloat16", shards=2)
    return tmp_path / "hf"


# ---------------------------------------------------------------------- the table of a dry run
def test_a_dry_run_writes_nothing_and_says_all(hf, tmp_path):
    said = str(convert_to_mindspore(hf, tmp_path / "new" / "ms", dtype="float32", dry_run=True))
    assert not (tmp_path / "new").exists()
    row = "  transformer.h.1.mlp.down_proj.weight -> model.layers.1.feed_forward.w2.weight  64x96  "
    assert f"{row}bfloat16 -> float32  24,576\n" in said
    rows = [line for line in said.splitlines() if " -> model." in line or " -> lm_head" in line]
    assert len(rows) == 23 and "would write 23 tensors" in said
    sizes = [int(line.rsplit("  ", 1)[1].replace(",", "")) for line in rows]
    assert sum(sizes) == 2 * sum(len(data) for _, _, data in stored_tensors(hf).values())


def test_the_table_of_stacked_experts(tmp_path):
    write_hf_folder(tmp_path / "hf", MOE, seed=2)
    said = str(convert_to_mindspore(tmp_path / "hf", tmp_path / "ms", dry_run=True, max_shard_size=100_000))
    first = "transformer.h.0.mlp.local_experts.0.gate_proj.weight and 3 more"
    assert f"  {first} -> model.layers.0.feed_forward.ffn.w1.weight  4x40x64  float32  40,960\n" in said
    assert "model-00001-of-" in said


def test_the_table_of_the_115b(shared_data):
    """963 rows without a byte of weights; their bytes are those of the index of the release."""
    folder = shared_data / "release_115b"
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = described({name: hf_shapes(config)[name] for name in index["weight_map"]})
    plan = make_plan(tensors, "torch", TelechatSizes.from_hf_config(config), "115B")
    said = table(Job(Path("hf"), plan.named_sources, {"all": plan.weights}, list, "ms"), None)
    assert said.startswith("all: 963 tensors, 453,131,665,408 bytes\n")
    assert said.count(" -> ") == 963


# ---------------------------------------------------------------------- the manifest
def test_the_manifest_by_the_library(hf, tmp_path):
    """Sizes, dtypes, shapes and checksums of every tensor, against what safetensors and xxhash read."""
    import xxhash

    summary = convert_to_mindspore(hf, tmp_path / "ms", max_shard_size=100_000)
    manifest = json.loads((tmp_path / "ms" / "manifest.json").read_text())
    assert {tmp_path / "ms" / name for name in manifest["files"]} == set(summary.files)
    codes = {"bfloat16": "BF16"}
    for name, entry in manifest["files"].items():
        file = tmp_path / "ms" / name
        assert file.stat().st_size == entry["bytes"]
        assert {
            name: (codes[tensor["dtype"]], tensor["shape"], tensor["checksum"])
            for name, tensor in entry["tensors"].items()
        } == {
            name: (dtype, list(shape), xxhash.xxh3_128_hexdigest(data))
            for name, (dtype, shape, data) in stored_tensors(file).items()
        }
    entries = {name: e for file in manifest["files"].values() for name, e in file["tensors"].items()}
    assert entries["model.layers.1.attention.wk_v.weight"]["source"] == [
        "transformer.h.1.self_attention.key_value.weight"
    ]
    assert {Path(file).name: said["bytes"] for file, said in manifest["source"]["files"].items()} == {
        file.name: file.stat().st_size for file in hf.glob("*.safetensors")
    }
    assert manifest["options"] == {"dtype": None, "verified": True, "layout": {}}
    assert read_metadata(summary.files[0]) == {"format": "ms"}


def test_the_sources_of_a_stack(tmp_path):
    write_hf_folder(tmp_path / "hf", MOE, seed=2)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    manifest = json.loads((tmp_path / "ms" / "manifest.json").read_text())
    tensors = manifest["files"]["model.safetensors"]["tensors"]
    assert tensors["model.layers.1.feed_forward.ffn.w2.bias"]["source"] == [
        f"transformer.h.1.mlp.local_experts.{expert}.down_proj.bias" for expert in range(4)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_and_infinities_are_counted(tmp_path, dtype):
    write_hf_folder(tmp_path / "hf", {"n_layer": 1}, seed=3)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][3, :5] = [np.nan, np.inf, -np.inf, -np.nan, np.inf]
    tensors["transformer.ln_f.weight"][-1] = -np.inf
    tensors["transformer.h.0.mlp.down_proj.bias"][0] = -np.nan
    save_file(tensors, file)
    summary = convert_to_mindspore(tmp_path / "hf", tmp_path / "ms", dtype=dtype)
    assert (summary.nan, summary.inf) == (3, 4)
    assert "values that are not numbers: 3 NaN, 4 infinite" in str(summary)
    manifest = json.loads((tmp_path / "ms" / "manifest.json").read_text())
    found = {
        name: (tensor.get("nan"), tensor.get("inf"))
        for name, tensor in manifest["files"]["model.safetensors"]["tensors"].items()
        if "nan" in tensor or "inf" in tensor
    }
    assert found == {
        "lm_head.weight": (2, 3),
        "model.norm_out.weight": (None, 1),
        "model.layers.0.feed_forward.w2.bias": (1, None),
    }


# ---------------------------------------------------------------------- verification
def refused_and_gone(hf, target, *values, convert=convert_to_mindspore, **options):
    with refused(*values):
        convert(hf, target, **options)
    assert not target.exists()


def test_a_byte_that_changes_on_its_way_is_found(hf, tmp_path, monkeypatch):
    plain = run.fsync

    def flip(file):
        plain(file)
        with open(file, "r+b") as stream:
            stream.seek(-1, 2)
            last = stream.read(1)[0]
            stream.seek(-1, 2)
            stream.write(bytes([last ^ 1]))

    monkeypatch.setattr(run, "fsync", flip)
    refused_and_gone(hf, tmp_path / "ms", "model.safetensors", "checksum")
    with monkeypatch.context() as patch:  # what --no-verify does not see
        patch.setattr(run, "_write_small", lambda file, content: file.write_bytes(content))
        assert not convert_to_mindspore(hf, tmp_path / "unseen", verify=False).verified


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_two_weights_in_each_others_place_are_found(hf, tmp_path, monkeypatch, dtype):
    """All checksums fit, names and shapes too: only the way back tells."""
    from research.telechat2.checkpoint.layouts import read

    plain = read.make_plan

    def swapped(tensors, side, *rest):
        plan = plain(tensors, side, *rest)
        if side == "torch":
            names = [name for _, name in plan.weights]
            a, b = (names.index(f"model.layers.0.feed_forward.{weight}.weight") for weight in ("w1", "w3"))
            (first, one), (second, other) = plan.weights[a], plan.weights[b]
            plan.weights[a], plan.weights[b] = (second, one), (first, other)
        return plan

    monkeypatch.setattr(read, "make_plan", swapped)
    refused_and_gone(hf, tmp_path / "ms", "gate_proj.weight", dtype=dtype)


def test_experts_in_another_order_are_found(tmp_path, monkeypatch):
    from research.telechat2.checkpoint import plan

    write_hf_folder(tmp_path / "hf", MOE, seed=2)
    plain = plan.join
    monkeypatch.setattr(plan, "join", lambda parts, *rest: plain(parts[::-1], *rest))
    refused_and_gone(tmp_path / "hf", tmp_path / "ms", ".local_experts.0.")
    refused_and_gone(tmp_path / "hf", tmp_path / "x.ckpt", ".local_experts.")


def test_a_header_that_is_wrong_is_found(hf, tmp_path, monkeypatch):
    plain = copy.header_bytes

    def other(tensors, metadata):
        swapped = dict(tensors)
        swapped["model.layers.0.attention_norm.weight"], swapped["model.layers.0.ffn_norm.weight"] = (
            swapped.pop("model.layers.0.ffn_norm.weight"),
            swapped.pop("model.layers.0.attention_norm.weight"),
        )
        return plain(swapped, metadata)

    monkeypatch.setattr(copy, "header_bytes", other)
    refused_and_gone(hf, tmp_path / "ms", "model.safetensors", "_norm.weight")


def test_a_ckpt_is_verified_too(hf, tmp_path, monkeypatch):
    plain = run.write_ckpt

    def other(file, tensors):
        plain(file, ((name, dtype, shape, bytearray(len(data))) for name, dtype, shape, data in tensors))

    monkeypatch.setattr(run, "write_ckpt", other)
    refused_and_gone(hf, tmp_path / "x.ckpt", "x.ckpt", "checksum")


def test_what_is_moved_as_ranges_is_not_read_twice(tmp_path, monkeypatch):
    """Neither joined experts, nor those cut apart again, nor casts."""
    write_hf_folder(tmp_path / "hf", MOE, seed=2)
    monkeypatch.setattr(StoredTensor, "checksum", lambda *_: pytest.fail("read a second time"))
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms", dtype="bfloat16")
    convert_to_torch(tmp_path / "ms", tmp_path / "back", dtype="float16")


# ---------------------------------------------------------------------- flags and memory
@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("1.5gb", 15 * 10**8), ("64MiB", 64 << 20), ("7", 7), ("2 KB", 2000)],
)
def test_sizes(size, expected):
    from research.telechat2.checkpoint.convert import parse_size

    assert parse_size(size) == expected


def test_flags_that_contradict_each_other(hf, tmp_path):
    with refused("x.safetensors", "1,000", "--max_shard_size"):
        convert_to_mindspore(hf, tmp_path / "x.safetensors", max_shard_size=1000)
    with refused("1,000", "--max_shard_size"):
        convert_to_mindspore(hf, tmp_path / "ms", "ckpt", max_shard_size=1000)
    with refused("max_shard_size", 0):
        convert_to_mindspore(hf, tmp_path / "ms", max_shard_size=0)
    script = CHECKOUT / "research" / "telechat2" / "convert_weight.py"
    told = subprocess.run(
        [sys.executable, script, "--torch_path", "hf", "--mindspore_path", "ms", "--max_shard_size", "much"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (
        told.returncode == 2
        and "'much' is no size; expected a number of bytes, or such as 5GB" in told.stderr
    )


MEASURED = """
import resource, sys
from research.telechat2.checkpoint.convert import convert_to_mindspore
from research.telechat2.checkpoint.job import copy as copying
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_to_mindspore("hf", "ms", dtype=sys.argv[1] or None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, copying.MEMORY_BYTES)
"""


@pytest.mark.parametrize("dtype", ["", "float16"])
def test_resident_memory_stays_within_the_stated_bound(tmp_path, dtype):
    """150 MB of weights; a process needs its libraries and no more than the bound beside them."""
    write_hf_folder(tmp_path / "hf", {"vocab_size": 300_000, "n_layer": 1, "hidden_size": 128}, seed=4,
                    dtype="bfloat16")  # fmt: skip
    assert sum(file.stat().st_size for file in (tmp_path / "hf").iterdir()) > 150e6
    told = subprocess.run(
        [sys.executable, "-c", MEASURED, dtype],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    grown, bound = map(int, re.findall(r"\d+", told.stdout))
    assert grown <= bound + 30e6  # what NumPy and the threads allocate once
    assert bound <= 100e6


MEASURED_CKPT = """
import resource, sys
import mindspore
from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "out":
    convert_to_mindspore("hf", "ms.ckpt")
else:
    convert_to_torch("ms.ckpt", "back")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_a_ckpt_needs_twice_the_model(tmp_path):
    """In either direction, besides what MindSpore needs itself."""
    write_hf_folder(tmp_path / "hf", {"vocab_size": 1_000_000, "n_layer": 1, "hidden_size": 128}, seed=4,
                    dtype="bfloat16")  # fmt: skip
    nbytes = sum(len(data) for _, _, data in stored_tensors(tmp_path / "hf").values())
    for direction in ("out", "in"):
        told = subprocess.run(
            [sys.executable, "-c", MEASURED_CKPT, direction],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert told.returncode == 0, told.stderr
        assert int(told.stdout.split()[-1]) <= 2 * nbytes + 100e6
    assert stored_tensors(tmp_path / "back") == stored_tensors(tmp_path / "hf")
