"""A setting that MindFormers refuses is told from a defect of ours by the code that raised the error."""

import pytest
from mindformers.core.lr import build_lr
from mindformers.tools.register.register import MindFormerModuleType, MindFormerRegister
from mindspore import nn, ops

from research.telechat2.compat.refusal import is_refusal
from research.telechat2.data.records import Rules
from research.telechat2.run.records import sample
from research.telechat2.telechat_config import TelechatConfig


def raised(call) -> Exception:
    with pytest.raises((ValueError, TypeError, KeyError)) as found:
        call()
    return found.value


def test_what_mindformers_refuses():
    assert is_refusal(raised(lambda: MindFormerRegister.get_cls(MindFormerModuleType.LR, "None such")))
    step = {"type": "ConstantWarmUpLR", "learning_rate": 1.0, "warmup_steps": "many"}
    assert is_refusal(raised(lambda: build_lr(step)))


def test_a_defect_of_ours_also_where_mindformers_raises_it_again():
    assert not is_refusal(raised(lambda: sample([1], None)))
    assert not is_refusal(raised(lambda: Rules("x")))  # raised in this file, which is nobody's

    class Broken(TelechatConfig):
        def __init__(self, **_):
            sample([1], None)

    MindFormerRegister.register_cls(Broken, MindFormerModuleType.CONFIG)
    build = MindFormerRegister.get_instance_from_cfg
    assert not is_refusal(raised(lambda: build({"type": "Broken"}, MindFormerModuleType.CONFIG)))


def test_an_error_in_the_compilation_of_a_graph():
    class Misshapen(nn.Cell):
        def construct(self):
            return ops.ReduceSum()(ops.ones((2, 3)), 7)

    assert not is_refusal(raised(Misshapen()))
