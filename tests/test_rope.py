"""Rotary tables: closed forms in float64, and what each extension method changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn
from model_fixtures import int32

from research.telechat2.telechat_config import TelechatConfig
from research.telechat2.telechat_rope import RotaryTables, rotary_tables


def config_of(head_dim: int = 64, **more) -> TelechatConfig:
    return TelechatConfig(hidden_size=2 * head_dim, num_heads=2, **more)


def closed_form(length, head_dim, theta, position_scale=1.0):
    """Angle of position t and channel pair i, one at a time: t * scale * theta^(-2i/D)."""
    angles = np.empty((length, head_dim))
    for t in range(length):
        for i in range(head_dim // 2):
            angles[t, i] = angles[t, i + head_dim // 2] = t * position_scale * theta ** (-2.0 * i / head_dim)
    return np.cos(angles), np.sin(angles)


@settings(max_examples=40, deadline=None)
@given(
    head_dim=st.sampled_from([2, 8, 64, 128, 160]),
    theta=st.sampled_from([500.0, 10000.0, 1e6]),
    method=st.sampled_from(["None", "PI", "NTK"]),
    factor=st.sampled_from([1.0, 2.0, 4.0, 8.5]),
    length=st.integers(1, 40),
)
def test_tables_equal_their_closed_form(head_dim, theta, method, factor, length):
    """PI divides positions by the factor, NTK multiplies theta by it (not by its power d/(d-2))."""
    scaling = {} if method == "None" else {"scaling_factor": factor}
    found = rotary_tables(config_of(head_dim, theta=theta, extend_method=method, **scaling), length)
    expected = closed_form(
        length, head_dim, theta * (factor if method == "NTK" else 1.0), 1 / factor if method == "PI" else 1.0
    )
    for table, exact in zip(found, expected, strict=True):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, exact, rtol=0, atol=1e-7)


def test_far_positions_are_exact():
    """In float32 an angle of some thousands is off by 1e-4; the tables must not be."""
    cos, sin = rotary_tables(config_of(), 8193)
    i = np.arange(64) % 32
    exact = 8192 * 10000.0 ** (-2.0 * i / 64)
    np.testing.assert_allclose(cos[8192], np.cos(exact), rtol=0, atol=1e-7)
    np.testing.assert_allclose(sin[8192], np.sin(exact), rtol=0, atol=1e-7)


def test_interpolated_positions_are_those_between():
    """With factor 2, position 2t is the trained position t."""
    plain = rotary_tables(config_of(), 10)
    interpolated = rotary_tables(config_of(extend_method="PI", scaling_factor=2.0), 20)
    for table, wide in zip(plain, interpolated, strict=True):
        np.testing.assert_array_equal(wide[::2], table)


class Both(nn.Cell):
    """A model's tables for a whole sequence, and for the positions given."""

    def __init__(self, config):
        super().__init__()
        self.tables = RotaryTables(config)

    def construct(self, positions):
        return self.tables.sequence(5), self.tables.tokens(positions)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_gets_the_rows_of_its_positions(dtype):
    config = config_of(8, seq_length=12, rotary_dtype=dtype)
    expected = [table.astype(dtype) for table in rotary_tables(config, 13)]
    positions = [12, 0, 7, 7]
    for found in zip(*(map(Tensor.asnumpy, pair) for pair in Both(config)(int32(positions))), strict=True):
        table = expected.pop(0)
        np.testing.assert_array_equal(found[0], table[:5])
        np.testing.assert_array_equal(found[1], table[positions])
