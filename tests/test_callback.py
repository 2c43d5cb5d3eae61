"""TelechatMonitor: it counts steps that trained nothing, and draws the loss curve."""

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from research.telechat2 import telechat_callback
from research.telechat2.telechat_callback import TelechatMonitor, draw_loss_curve


def context(step: int, outputs):
    params = SimpleNamespace(cur_step_num=step, net_outputs=outputs)
    return SimpleNamespace(original_args=lambda: params)


def wrapped(loss: float) -> tuple:
    """What MFTrainOneStepCell returns: loss, overflow, scale, learning rate, norm."""
    return Tensor(np.array([loss], np.float32)), Tensor(False), Tensor(1.0), Tensor(1e-3), None


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    found = []
    logger = SimpleNamespace(warning=lambda text, *values: found.append(text % values))
    monkeypatch.setattr(telechat_callback, "logger", logger)
    return found


@pytest.fixture
def output(monkeypatch, tmp_path):
    monkeypatch.setattr(telechat_callback, "output_directory", lambda: str(tmp_path / "out"))
    return tmp_path / "out"


def test_steps_that_trained_nothing_are_counted_and_named(messages, output):
    monitor = TelechatMonitor()
    for step, loss in enumerate([2.5, 0.0, 1.5, 0.0], start=1):
        monitor.step_end(context(step, wrapped(loss)))
    assert monitor.losses == [2.5, 0.0, 1.5, 0.0] and monitor.steps == [1, 2, 3, 4]
    assert [message.split()[1] for message in messages] == ["2", "4"]
    monitor.end(context(4, wrapped(0.0)))
    assert messages[-1].startswith("2 of 4 steps trained nothing")
    assert "telechat_preprocess.py" in messages[-1]


def test_nothing_is_said_of_a_run_that_trained(messages, output):
    monitor = TelechatMonitor()
    monitor.step_end(context(1, wrapped(3.0)))
    monitor.end(context(1, wrapped(3.0)))
    assert messages == []


@pytest.mark.parametrize("outputs", [Tensor(np.float32(0.25)), [Tensor(np.float32(0.25))], 0.25])
def test_the_loss_is_found_in_whatever_a_step_returns(outputs):
    monitor = TelechatMonitor()
    monitor.step_end(context(1, outputs))
    assert monitor.losses == [0.25]


def test_each_epoch_draws_the_curve_anew(output):
    from PIL import Image

    monitor = TelechatMonitor()
    monitor.epoch_end(context(0, None))
    assert not output.exists()  # nothing known yet, nothing drawn
    curves = []
    for step in range(1, 5):
        monitor.step_end(context(step, wrapped(4.0 / step)))
        monitor.epoch_end(context(step, wrapped(4.0 / step)))
        with Image.open(output / "loss_curve.png") as image:
            assert image.format == "PNG" and image.size[0] >= 640
            curves.append(np.asarray(image.convert("L")))
    assert not np.array_equal(curves[1], curves[3])
    assert [path.name for path in output.iterdir()] == ["loss_curve.png"]


def test_a_resumed_run_leaves_the_first_ones_picture(output):
    output.mkdir()
    (output / "loss_curve.png").write_bytes(b"the first run's")
    monitor = TelechatMonitor()
    monitor.step_end(context(11, wrapped(2.0)))
    monitor.epoch_end(context(11, wrapped(2.0)))
    assert (output / "loss_curve.png").read_bytes() == b"the first run's"
    assert (output / "loss_curve_from_step_11.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "losses", [[1.0, 0.0, 0.5], [0.0, 0.0], [2.0], [float("nan"), 1.0], [float("inf"), 1.0]]
)
def test_odd_losses_are_drawn_without_complaint(tmp_path, losses, recwarn):
    draw_loss_curve(list(range(len(losses))), losses, tmp_path / "new" / "curve.png")
    assert (tmp_path / "new" / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not recwarn.list
