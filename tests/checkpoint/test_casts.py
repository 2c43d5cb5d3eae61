"""--dtype: the same rounding as torch's, in either direction, through files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import stored_tensors, write_hf_folder
from refusal import refused

from research.telechat2.checkpoint.convert import (
    convert_to_mindspore,
    convert_to_torch,
    read_mindspore_tensors,
)
from research.telechat2.checkpoint.storage import tensor as stored
from research.telechat2.checkpoint.storage.dtypes import cast

DTYPES = ["float32", "float16", "bfloat16"]
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_as_torch_rounds(tmp_path, monkeypatch, source, target):
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr(stored, "BLOCK_BYTES", 1 << 10)  # so that tensors are many blocks
    monkeypatch.setattr("research.telechat2.checkpoint.storage.safetensors_format.BLOCK_BYTES", 1 << 10)
    write_hf_folder(tmp_path / "hf", {"num_key_value_heads": 2}, seed=1, dtype=source)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms", dtype=target)
    summary = convert_to_torch(tmp_path / "ms", tmp_path / "back")
    assert summary.dtypes == (target,)
    expected = {
        name: tensor.to(getattr(torch, target)).view(torch.uint8).numpy().tobytes()
        for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()
    }
    after = stored_tensors(tmp_path / "back")
    assert {name: data for name, (_, _, data) in after.items()} == expected
    assert {dtype for dtype, _, _ in after.values()} == {CODES[target]}


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_every_bit_pattern_to_bfloat16(patterns):
    """Denormals, ties, infinities and NaN: equal to torch's cast, NaN staying NaN."""
    import torch

    values = np.array(patterns, np.uint32).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    if (torch.isinf(expected) & torch.isfinite(torch.from_numpy(values))).any():
        with refused("bfloat16"):
            cast(values.tobytes(), "float32", "bfloat16", "w")
        return
    ours = torch.frombuffer(
        bytearray(cast(values.tobytes(), "float32", "bfloat16", "w")), dtype=torch.bfloat16
    )
    assert torch.equal(ours.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(ours[number].view(torch.int16), expected[number].view(torch.int16))


def test_a_value_beyond_the_range_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    write_hf_folder(tmp_path / "hf", {}, seed=2)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.ln_f.weight"][5] = 70000.0
    save_file(tensors, file)
    with refused("transformer.ln_f.weight", 70000.0, "float16"):
        convert_to_mindspore(tmp_path / "hf", tmp_path / "ms", dtype="float16")
    assert not (tmp_path / "ms").exists()
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms", dtype="bfloat16")

    tensors["transformer.ln_f.weight"][5] = np.inf  # was infinite before: stays so
    save_file(tensors, file)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms2", dtype="float16")
    arrays = dict(read_mindspore_tensors(tmp_path / "ms2"))
    assert np.isinf(arrays["model.norm_out.weight"][5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_arrays(tmp_path, dtype):
    from safetensors.torch import load_file

    write_hf_folder(tmp_path / "hf", {"num_key_value_heads": 1}, seed=3, dtype=dtype)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    arrays = dict(read_mindspore_tensors(tmp_path / "ms"))
    original = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(arrays) == len(original)
    w2 = arrays["model.layers.1.feed_forward.w2.weight"]
    assert w2.dtype == (np.float32 if dtype == "bfloat16" else np.dtype(dtype))
    assert np.array_equal(
        w2.astype(np.float32), original["transformer.h.1.mlp.down_proj.weight"].float().numpy()
    )
