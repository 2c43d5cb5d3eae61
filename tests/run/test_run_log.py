"""Warnings of the loaders: silent about what no checkpoint needs to hold, loud about weights."""

import logging

import mindspore as ms
import pytest
from mindspore import Parameter, Tensor, nn

from research.telechat2.run.weights import hush_loaders, is_worth_saying


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("x", logging.WARNING, "x.py", 1, message, (), None)


LOAD, CACHE = "model.layers.0.feed_forward.expert_load", "model.layers.0.attention.key_cache"
WEIGHT = "model.norm_out.weight"


@pytest.mark.parametrize(
    ("message", "heard"),
    [
        (f"No source parameters found for dst_param: {LOAD}, skipping", False),
        (f"No source parameters found for dst_param: {WEIGHT}, skipping", True),
        (f"{[LOAD, CACHE]} are not loaded.", False),
        (f"{[LOAD, WEIGHT, CACHE]} are not loaded.", True),
        ("Loading parameters into net is finished.", True),
    ],
)
def test_only_what_is_no_weight_is_hushed(message, heard):
    assert is_worth_saying(record(message)) == heard


class Net(nn.Cell):
    def __init__(self, name: str):
        super().__init__()
        self.held = Parameter(Tensor([1.0]), name="held")
        self.other = Parameter(Tensor([1.0]), name=name)


@pytest.mark.parametrize(("name", "warnings"), [("expert_load", 0), ("weight", 1)])
def test_mindspores_own_loader_is_heard_where_a_weight_is_missing(name, warnings, caplog):
    hush_loaders()
    with caplog.at_level(logging.WARNING):
        missing, _ = ms.load_param_into_net(Net(name), {"held": Parameter(Tensor([2.0]), name="held")})
    assert missing == [name]
    assert len([r for r in caplog.records if "not loaded" in r.getMessage()]) == warnings
