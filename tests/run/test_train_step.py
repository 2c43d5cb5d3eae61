"""The training step on a CPU: overflow is found in any gradient, and such a step changes nothing."""

import numpy as np
import pytest
from mindformers.core.optim import AdamW
from mindspore import Parameter, Tensor, nn, ops
from model_fixtures import RandomModel, int32

from research.telechat2.run.train_step import MFTrainOneStepCell


class Weighted(nn.Cell):
    """Loss ``sum(first * a) + sum(second * b) + third * c``: the inputs are the gradients."""

    def __init__(self):
        super().__init__()
        self.first = Parameter(Tensor(np.full((2, 3), 0.5, np.float32)), name="first")
        self.second = Parameter(Tensor(np.full(4, 0.5, np.float32)), name="second")
        self.third = Parameter(Tensor(np.full(1, 0.5, np.float32)), name="third")
        self.sum = ops.ReduceSum()

    def construct(self, a, b, c):
        return self.sum(self.first * a) + self.sum(self.second * b) + self.sum(self.third * c)


@pytest.fixture(scope="module")
def step():
    """Plain gradient descent with rate 1, as MindFormers wraps it."""
    network = Weighted().set_train(True)
    optimizer = nn.SGD(network.trainable_params(), learning_rate=1.0)
    return MFTrainOneStepCell(network, optimizer, use_clip_grad=False).set_train(True)


def take(step, gradients) -> tuple[bool, list[np.ndarray]]:
    """Whether the step reports overflow, and by how much each parameter went down."""
    parameters = step.network.trainable_params()
    before = [parameter.asnumpy().copy() for parameter in parameters]
    _, overflow, *_ = step(*(Tensor(gradient) for gradient in gradients))
    moved = [old - parameter.asnumpy() for old, parameter in zip(before, parameters, strict=True)]
    return bool(overflow.asnumpy()), moved


def ordinary() -> list[np.ndarray]:
    return [np.full(shape, value, np.float32) for shape, value in (((2, 3), 0.25), (4, -0.5), (1, 0.125))]


def test_finite_gradients_are_applied(step):
    overflow, moved = take(step, ordinary())
    assert not overflow
    for change, gradient in zip(moved, ordinary(), strict=True):
        np.testing.assert_allclose(change, gradient, rtol=1e-6)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("index", "position"), [(0, (1, 2)), (0, (0, 0)), (1, (3,)), (2, (0,))])
def test_one_element_that_is_not_finite_skips_the_step(step, index, position, value):
    gradients = ordinary()
    gradients[index][position] = value
    overflow, moved = take(step, gradients)
    assert overflow
    assert all(np.all(change == 0) for change in moved)


def test_the_largest_finite_gradients_are_no_overflow(step):
    """A sum over the gradients would be infinite here; each of them is not."""
    gradients = [np.full_like(gradient, np.finfo(np.float32).max) for gradient in ordinary()]
    overflow, _ = take(step, gradients)
    assert not overflow
    for parameter in step.network.trainable_params():
        parameter.set_data(Tensor(np.full(parameter.shape, 0.5, np.float32)))


def test_a_step_over_an_overflow_trains_again_after(step):
    gradients = ordinary()
    gradients[0][0, 0] = np.nan
    assert take(step, gradients)[0]
    overflow, moved = take(step, ordinary())
    assert not overflow
    np.testing.assert_allclose(moved[1], ordinary()[1], rtol=1e-6)


def test_the_model_trains_and_a_record_with_no_trained_token_moves_no_gradient(tmp_path):
    """AdamW with clipping, as the YAMLs have it: the loss falls; an untrained batch has loss and norm 0."""
    random = RandomModel(tmp_path, hidden_size=64, n_head=1, n_layer=1, ffn_hidden_size=96, vocab_size=64)
    model = random.build(seq_length=16).set_train(True)
    optimizer = AdamW(model.trainable_params(), learning_rate=1e-2)
    step = MFTrainOneStepCell(model, optimizer, use_clip_grad=True, max_grad_norm=1.0).set_train(True)
    ids = np.random.default_rng(0).integers(4, 64, (2, 17))
    losses = []
    for _ in range(8):
        loss, overflow, *_ = step(int32(ids), int32(ids))
        losses.append(float(loss.asnumpy()))
        assert not overflow.asnumpy()
    assert losses[-1] < 0.7 * losses[0]
    loss, overflow, _, _, norm = step(int32(ids), int32(np.full_like(ids, -100)))
    assert float(loss.asnumpy()) == 0.0 and not overflow.asnumpy() and float(norm.asnumpy()) == 0.0
    assert all(np.isfinite(parameter.asnumpy()).all() for parameter in model.trainable_params())
