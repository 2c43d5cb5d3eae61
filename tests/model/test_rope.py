"""Rotary tables: closed forms in float64, transformers' own, and what each extension method changes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn
from model_fixtures import int32
from refusal import refused
from rope_oracle import torch_release
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from research.telechat2.model.rope import RotaryTables, dynamic_ntk, inverse_frequencies, rotary_tables
from research.telechat2.telechat_config import TelechatConfig


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


# ---------------------------------------------------------------------- against transformers
def of_transformers(config, theta: float, scaling: dict | None = None):
    """transformers' frequencies and scale of the same model."""
    kind = "default" if scaling is None else scaling["rope_type"]
    sizes = LlamaConfig(
        hidden_size=config.hidden_size, num_attention_heads=config.num_heads, rope_theta=theta,
        rope_scaling=scaling, max_position_embeddings=config.max_position_embedding,
    )  # fmt: skip
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](sizes, "cpu")
    return frequencies.numpy(), scale


def assert_as_transformers(config, theta: float, scaling: dict | None = None) -> None:
    found, expected = inverse_frequencies(config), of_transformers(config, theta, scaling)
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)  # transformers computes in float32
    assert found[1] == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("head_dim", [64, 128, 160])
@pytest.mark.parametrize("factor", [1.0, 2, 8.5])
def test_one_factor_methods_are_those_of_transformers(head_dim, factor):
    assert_as_transformers(config_of(head_dim), 10000.0)
    linear = {"rope_type": "linear", "factor": factor}
    for given_factor in (factor, {"factor": factor}):
        for method in ("PI", "linear"):
            config = config_of(head_dim, extend_method=method, scaling_factor=given_factor)
            assert_as_transformers(config, 10000.0, linear)
    assert_as_transformers(config_of(head_dim, extend_method="NTK", scaling_factor=factor), 10000.0 * factor)


@settings(max_examples=60, deadline=None)
@given(
    head_dim=st.sampled_from([32, 64, 128, 160]),
    theta=st.sampled_from([500.0, 10000.0, 1e6]),
    factor=st.sampled_from([1.0, 2.0, 16, 40.0]),
    trained=st.sampled_from([None, 2048, 8192]),
    betas=st.sampled_from([{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"beta_fast": 32, "beta_slow": 32}]),
    scales=st.sampled_from(
        [{}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"mscale": 0.5, "mscale_all_dim": 2}]
    ),
)
def test_yarn_is_that_of_transformers(head_dim, theta, factor, trained, betas, scales):
    scaling = {"factor": factor, **betas, **scales}
    if trained:
        scaling["original_max_position_embeddings"] = trained
    config = config_of(
        head_dim, theta=theta, max_position_embedding=4096, extend_method="yarn", scaling_factor=scaling
    )
    assert_as_transformers(config, theta, {"rope_type": "yarn", **scaling})


def test_yarn_scales_cosine_and_sine():
    config = config_of(8, extend_method="YARN", scaling_factor={"factor": 4.0})
    cos, sin = rotary_tables(config, 30)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(4) + 1, rtol=1e-6)


# ---------------------------------------------------------------------- dynamic NTK
@pytest.mark.parametrize(
    ("length", "alpha", "theta", "mscale"),
    [  # spec: model_family.md 1.2 and existing_implementation.md 6.4, trained at 8192, head_dim 128
        (1, 1, 10000.0, 1.0),
        (8192, 1, 10000.0, 1.0),
        (8193, 3, 30527.737, 1.000012),
        (12000, 3, 30527.737, 1.038175),
        (16384, 3, 30527.737, 1.0693147),
        (24576, 7, 72195.860, 1.109861),
        (32768, 7, 72195.860, 1.1386294),
        (65536, 15, 156588.323, 1.207944),
        (98304, 31, 327366.399, 1.248491),
        (131072, 31, 327366.399, 1.277259),
        (262144, 63, 672824.056, 1.346574),
    ],
)
def test_golden_factors_of_the_torch_release(length, alpha, theta, mscale):
    found = dynamic_ntk(length, 8192, 8192)
    assert found == (alpha, pytest.approx(mscale, abs=6e-7))
    config = config_of(128, extend_method="DYNAMIC_NTK", max_position_embedding=8192, seq_length=length)
    frequencies, scale = inverse_frequencies(config)
    assert frequencies[1] ** -64 == pytest.approx(theta, rel=1e-7)
    assert scale == found[1]


def test_base_and_trained_length_may_differ():
    """TeleChat v1 7B has base 4096 and was trained at 8192: alpha 3 at every trained length."""
    assert dynamic_ntk(100, 4096, 8192) == dynamic_ntk(8192, 4096, 8192) == (3, 1.0)
    assert dynamic_ntk(8193, 4096, 8192)[0] == 7
    assert dynamic_ntk(1000, 8192, 4096) == (1, 1.0)


@given(length=st.integers(1, 300_000), base=st.sampled_from([100, 4096, 8192]), trained=st.integers(1, 9000))
def test_factors_are_those_of_the_torch_release(length, base, trained):
    assert dynamic_ntk(length, base, trained) == pytest.approx(torch_release(length, base, trained))


class OfRequests(nn.Cell):
    """The tables of positions, each by the factor of a length."""

    def __init__(self, config):
        super().__init__()
        self.tables = RotaryTables(config)

    def construct(self, positions, lengths):
        return self.tables.tokens(positions, lengths)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_token_gets_the_tables_of_its_requests_length(dtype):
    sizes = {"max_position_embedding": 16, "rotary_dtype": dtype, "extend_method": "DYNAMIC_NTK"}
    cell = OfRequests(config_of(8, seq_length=128, use_past=True, **sizes))
    assert cell.tables.cos.shape == (4 * 129, 8)  # alphas 1, 3, 7 and 15
    lengths = [1, 16, 17, 32, 33, 90, 128, 128]
    positions = [0, 15, 16, 3, 32, 127, 64, 127]  # one beyond its length: an answer that outgrew its factor
    for name, found in zip(("cos", "sin"), cell(int32(positions), int32(lengths)), strict=True):
        for row, length, position in zip(found.asnumpy(), lengths, positions, strict=True):
            alone = rotary_tables(config_of(8, seq_length=length, **sizes), 128)[name == "sin"]
            assert row.dtype == dtype
            np.testing.assert_allclose(
                row, alone[position].astype(dtype), rtol=0, atol=2e-7 if dtype == "float32" else 1e-3
            )


def test_within_the_trained_length_the_tables_are_those_without_extension():
    sizes = {"seq_length": 64, "rotary_dtype": "float16", "use_past": True}
    extended = OfRequests(config_of(8, extend_method="DYNAMIC_NTK", max_position_embedding=16, **sizes))
    plain, positions = Both(config_of(8, **sizes)), int32(range(16))
    for found, expected in zip(extended(positions, positions + 1), plain(positions)[1], strict=True):
        np.testing.assert_array_equal(found.asnumpy(), expected.asnumpy())


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"extend_method": "PI", "scaling_factor": 0.5}, ("scaling_factor", 0.5, "PI", 1)),
        (
            {"extend_method": "linear", "scaling_factor": {"factors": 2}},
            ("scaling_factor", "factors", "linear"),
        ),
        ({"extend_method": "NTK", "scaling_factor": True}, ("scaling_factor", True, "NTK")),
        ({"extend_method": "YARN"}, ("scaling_factor", 1.0, "YARN", "factor")),
        (
            {"extend_method": "YARN", "scaling_factor": {"factor": 2.0, "beta": 3}},
            ("YARN", "beta", "beta_fast"),
        ),
        ({"extend_method": "YARN", "scaling_factor": {"factor": 0.5}}, ("scaling_factor.factor", 0.5, 1)),
        (
            {"extend_method": "YARN", "scaling_factor": {"factor": 2, "mscale": 1.0}},
            ("mscale", "mscale_all_dim"),
        ),
        (
            {"extend_method": "YARN", "scaling_factor": {"factor": 2, "beta_fast": 0.5}},
            ("scaling_factor.beta_fast", 0.5, "beta_slow"),
        ),
        ({"extend_method": "DYNAMIC_NTK", "scaling_factor": 2.0}, ("scaling_factor", 2.0, "DYNAMIC_NTK")),
        ({"extend_method": "DYNAMIC_NTK", "base_seqlen": 0}, ("base_seqlen", 0)),
        ({"extend_method": "DYNAMIC_NTK", "use_past": True, "is_dynamic": False}, ("is_dynamic: True",)),
        ({"extend_method": "DYNAMIC_NTK", "hidden_size": 64}, ("head_dim", 2, "DYNAMIC_NTK", 4)),
        ({"base_seqlen": 0}, ("base_seqlen", 0)),
        ({"training_seqlen": 4096, "extend_method": "None"}, ("seq_length", "training_seqlen 4096")),
        ({"training_seqlen": 4096, "max_position_embedding": 8192}, ("max_position_embedding", 8192, 4096)),
        ({"extend_by_prompt": True, "extend_method": "PI"}, ("extend_by_prompt", True, "PI")),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(fields, values):
    with refused(*values):
        TelechatConfig(**fields)


def test_methods_may_be_written_in_any_case():
    assert TelechatConfig(extend_method="LINEAR", scaling_factor=2.0).extend_method == "linear"
    config = TelechatConfig(extend_method="dynamic_ntk", max_position_embedding=4096)
    assert (config.extend_method, config.base_seqlen, config.training_seqlen) == ("DYNAMIC_NTK", 4096, 4096)


def test_without_a_method_texts_beyond_the_trained_length_are_read_as_in_torch():
    """TeleChat v1 7B: base 4096, trained at 8192, so alpha is 3 at every trained length."""
    lengths = {"base_seqlen": 4096, "training_seqlen": 8192}
    config = config_of(128, seq_length=8192, **lengths)
    assert (config.extend_method, config.max_position_embedding) == ("None", 8192)
    frequencies, scale = inverse_frequencies(config)
    assert frequencies[1] ** -64 == pytest.approx(30527.737, rel=1e-7) and scale == 1.0
    config = config_of(128, seq_length=16384, **lengths)
    assert config.extend_method == "DYNAMIC_NTK"
    for length in (100, 8192, 8193, 16384):
        alpha, mscale = torch_release(length, 4096, 8192)
        frequencies, scale = inverse_frequencies(config, length)
        assert frequencies[1] ** -64 == pytest.approx(10000 * alpha ** (128 / 126), rel=1e-7)
        assert scale == pytest.approx(mscale)
