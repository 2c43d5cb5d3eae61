"""Warnings of the libraries: silent about what no checkpoint needs to hold, loud about weights."""

import pytest

from research.telechat2.run.screen import is_expected

LOAD, CACHE = "model.layers.0.feed_forward.expert_load", "model.layers.0.attention.key_cache"
WEIGHT = "model.norm_out.weight"


@pytest.mark.parametrize(
    ("message", "resuming", "expected"),
    [
        (f"No source parameters found for dst_param: {LOAD}, skipping", False, True),
        (f"No source parameters found for dst_param: {WEIGHT}, skipping", False, False),
        (f"No source parameters found for dst_param: {WEIGHT}, skipping", True, False),
        (f"{[LOAD, CACHE]} are not loaded.", False, True),
        (f"{[LOAD, WEIGHT, CACHE]} are not loaded.", False, False),
        (f"{[LOAD, WEIGHT, CACHE]} are not loaded.", True, True),
        ("Loading parameters into net is finished.", False, False),
        ("For 'load_param_into_net', 2 parameters in the 'net' are not loaded, because", False, True),
    ],
)
def test_only_what_is_no_weight_is_hushed(message, resuming, expected):
    assert is_expected(message, resuming) == expected
