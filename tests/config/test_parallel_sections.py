"""Settings around a plan are refused before a run where MindSpore would refuse them, or train otherwise."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from refusal import refused

from research.telechat2.config.mindspore_context import check_parallel_sections
from research.telechat2.telechat_config import TelechatConfig


@pytest.fixture
def context():
    """Sets MindSpore's parallel context for one test."""
    yield ms.set_auto_parallel_context
    ms.reset_auto_parallel_context()


PIPELINE = {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}


@pytest.mark.parametrize(
    ("section", "value", "sentence"),
    [
        ("pipeline_config", {"pipeline_interleave": True}, ("pipeline_scheduler", "1f1b")),
        (
            "pipeline_config",
            {"pipeline_scheduler": "1f1b"},
            ("pipeline_interleave", "True"),
        ),
        (
            "pipeline_config",
            PIPELINE | {"pipeline_interleave": 1},
            ("pipeline_interleave", 1, "True"),
        ),
        (
            "parallel_optimizer_config",
            {"optimizer_level": "level3", "gradient_accumulation_shard": True},
            ("optimizer_level", "level3", "gradient_accumulation_shard True", "gradient_accumulation_sh"),
        ),
        (
            "parallel_optimizer_config",
            {"optimizer_level": "level3", "gradient_accumulation_shard": False},
            ("optimizer_level", "level3", "gradient_accumulation_shard False", "level2"),
        ),
        (
            "parallel_optimizer_config",
            {"gradient_accumulation_shard": "yes"},
            ("gradient_accumulation_shard", "'yes'", "True", "False"),
        ),
        (
            "parallel_optimizer_config",
            {"optimizer_level": 3},
            ("optimizer_level", 3, "level1"),
        ),
        (
            "parallel_optimizer_config",
            {"parallel_optimizer_threshold": -1},
            ("parallel_optimizer_threshold", -1, 0),
        ),
        (
            "parallel_optimizer_config",
            {"optimizer_weight_shard_size": 0},
            ("optimizer_weight_shard_size", 0, 1, -1),
        ),
    ],
)
def test_what_mindspores_context_refuses_is_refused_before(context, section, value, sentence):
    with refused(*sentence):
        check_parallel_sections({"use_parallel": True, "parallel": {section: value}})
    with pytest.raises((ValueError, TypeError, KeyError)):
        context(**{section: value})


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"pipeline_config": PIPELINE},
        {"parallel_optimizer_config": {"optimizer_level": "level3", "parallel_optimizer_threshold": 0}},
        {"parallel_optimizer_config": {"optimizer_level": "level2", "gradient_accumulation_shard": True}},
        {
            "parallel_optimizer_config": {
                "gradient_accumulation_shard": True,
                "optimizer_weight_shard_size": -1,
            }
        },
    ],
)
def test_what_mindspores_context_takes_is_taken(context, parallel):
    check_parallel_sections({"use_parallel": True, "parallel": parallel, "micro_batch_interleave_num": 1})
    context(**parallel)


class Mean(nn.Cell):
    """The mean of ``x * weight``: a loss."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(3, np.float32)), name="weight")
        self.mul, self.mean = ops.Mul(), ops.ReduceMean()

    def construct(self, x):
        return self.mean(self.mul(x, self.weight))


def test_copies_of_rows_are_refused_because_mindspore_adds_their_gradients_up():
    """Were that no longer so, the refusal could go."""
    x = Tensor(np.arange(12, dtype=np.float32).reshape(4, 3))
    one = Mean()
    loss, (gradient,) = ms.value_and_grad(one, None, one.trainable_params())(x)
    two = Mean()
    copies = nn.MicroBatchInterleaved(two, 2)
    doubled_loss, (doubled,) = ms.value_and_grad(copies, None, two.trainable_params())(x)
    np.testing.assert_allclose(gradient.asnumpy(), x.asnumpy().mean(0) / 3, rtol=1e-6)
    np.testing.assert_allclose(doubled.asnumpy(), 2 * gradient.asnumpy(), rtol=1e-6)
    assert float(doubled_loss.asnumpy()) == pytest.approx(2 * float(loss.asnumpy()), rel=1e-6)
    for value in (2, 0, True, "2"):
        with refused("micro_batch_interleave_num"):
            check_parallel_sections({"micro_batch_interleave_num": value})


@pytest.mark.parametrize("value", [True, False])
def test_ring_attention_is_refused_with_what_there_is_instead(value):
    with refused("use_ring_attention", "colossalai_cp", "ulysses_cp", "hybrid_cp"):
        TelechatConfig(use_ring_attention=value)
