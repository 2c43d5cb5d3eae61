"""Broken files of every kind: an error sentence each time, never a crash, and no output."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import write_hf_folder

from research.telechat2.checkpoint.convert import convert_to_mindspore

CHECKOUT = Path(__file__).resolve().parents[2]
CASES = int(os.environ.get("FUZZ_CASES", "150"))


@cache
def sound(num_experts: int | None = None) -> tuple[dict, bytes]:
    """The (header, data) of a sound file of two layers: not a fixture, which hypothesis would print."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 8, "ffn_hidden_size": 8, "vocab_size": 8, "n_head": 2}
        if num_experts:
            sizes["num_experts"] = num_experts
        write_hf_folder(Path(folder), sizes, seed=1)
        content = (Path(folder) / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def convert(content: bytes, index: bytes | None = None) -> ValueError | None:
    """Convert a folder of one such file; on an error, check that no output is left, and return it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        source.mkdir()
        (source / "model.safetensors").write_bytes(content)
        if index is not None:
            (source / "model.safetensors.index.json").write_bytes(index)
        try:
            convert_to_mindspore(source, Path(folder) / "out")
        except ValueError as error:
            assert str(error).strip()
            assert not (Path(folder) / "out").exists()
            assert len(list(Path(folder).rglob("*"))) == 2 + (index is not None)
            return error
        return None


def packed(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


experts = st.sampled_from([None, 3])


def test_the_sound_file_is_sound():
    assert convert(packed(*sound())) is None
    assert convert(packed(*sound(3))) is None


@settings(max_examples=CASES, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes(content):
    assert convert(content) is not None


@settings(max_examples=CASES, deadline=None)
@given(header=st.binary(max_size=100))
def test_any_header(header):
    assert convert(struct.pack("<Q", len(header)) + header) is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(["dtype", "shape", "data_offsets"])


@settings(max_examples=CASES, deadline=None)
@given(data=st.data(), num_experts=experts, value=json_values)
def test_one_field_replaced(data, num_experts, value):
    header, content = json.loads(json.dumps(sound(num_experts)[0])), sound(num_experts)[1]
    name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    field = data.draw(st.none() | fields)
    before = header[name]
    if field is None:
        header[name] = value
    else:
        header[name] = before | {field: value}
    if header[name] != before:
        assert convert(packed(header, content)) is not None


@settings(max_examples=CASES, deadline=None)
@given(data=st.data(), num_experts=experts, number=st.integers(-1, 2**64))
def test_one_number_replaced(data, num_experts, number):
    header, content = json.loads(json.dumps(sound(num_experts)[0])), sound(num_experts)[1]
    name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    numbers = header[name][data.draw(st.sampled_from(["shape", "data_offsets"]))]
    position = data.draw(st.integers(0, len(numbers) - 1))
    if numbers[position] != number:
        numbers[position] = number
        assert convert(packed(header, content)) is not None


@settings(max_examples=CASES, deadline=None)
@given(
    data=st.data(),
    num_experts=experts,
    new=st.text(max_size=40) | st.from_regex(r"transformer\.h\.\d{1,30}\.mlp\.\w+"),
)
def test_one_name_replaced(data, num_experts, new):
    header, content = dict(sound(num_experts)[0]), sound(num_experts)[1]
    old = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    if new != "__metadata__" and new not in header:
        header[new] = header.pop(old)
        assert convert(packed(header, content)) is not None


@settings(max_examples=CASES, deadline=None)
@given(data=st.data(), byte=st.integers(0, 255))
def test_one_byte_of_the_header_replaced(data, byte):
    """May still be sound (a space for a space); must not crash."""
    content = bytearray(packed(*sound()))
    length = struct.unpack("<Q", content[:8])[0]
    content[data.draw(st.integers(0, 8 + length - 1))] = byte
    convert(bytes(content))


@settings(max_examples=CASES, deadline=None)
@given(data=st.data())
def test_cut_off_anywhere(data):
    content = packed(*sound())
    assert convert(content[: data.draw(st.integers(0, len(content) - 1))]) is not None


@settings(max_examples=CASES, deadline=None)
@given(index=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_index(index):
    assert convert(packed(*sound()), index) is not None


@settings(max_examples=CASES, deadline=None)
@given(data=st.data(), value=json_values)
def test_one_entry_of_the_index_replaced(data, value):
    names = [name for name in sound()[0] if name != "__metadata__"]
    weight_map: dict = dict.fromkeys(names, "model.safetensors")
    weight_map[data.draw(st.sampled_from(names) | st.text(max_size=10))] = value
    assert convert(packed(*sound()), json.dumps({"weight_map": weight_map}).encode()) is not None


@pytest.mark.slow
def test_thousands_of_cases():
    """The same properties, with some thousand cases of each."""
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-c", str(CHECKOUT / "pyproject.toml"), __file__],
        env=os.environ | {"FUZZ_CASES": "3000"}, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0 and "deselected" in told.stdout, told.stdout
