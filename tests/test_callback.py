"""TelechatMonitor: it counts steps that trained nothing, draws the loss curve, and reports on experts."""

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

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


# --- experts ------------------------------------------------------------------------------------------------

# Layers 3 and 11 of some model: of all choices, the shares sent to and taken by each of 4 experts.
LOADS = {
    3: [[0.25, 0.25, 0.30, 0.20], [0.25, 0.25, 0.25, 0.20]],
    11: [[0.10, 0.55, 0.15, 0.20], [0.10, 0.40, 0.15, 0.20]],
}


class Network(nn.Cell):
    """What a training step wraps: layers with loads, and parameters that are none."""

    def __init__(self, loads: dict):
        super().__init__()
        names = {f"model.layers.{i}.feed_forward.expert_load": values for i, values in loads.items()}
        names |= {"model.layers.3.feed_forward.ffn.w1.weight": [1.0], "model.norm_out.weight": [1.0]}
        self.all = [
            Parameter(Tensor(np.array(values, np.float32)), name=name) for name, values in names.items()
        ]

    def get_parameters(self, expand=True):
        return iter(self.all)


class Writer:
    """Keeps what TensorBoard would draw."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, global_step):
        self.scalars[tag, global_step] = float(value)


@pytest.fixture
def report(monkeypatch):
    """Log lines and TensorBoard's scalars."""
    writer, lines = Writer(), []
    logger = SimpleNamespace(info=lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(telechat_callback, "library_logger", logger)
    monkeypatch.setattr(telechat_callback, "get_tensorboard_writer", lambda: writer)
    return SimpleNamespace(lines=lines, scalars=writer.scalars)


def train(network, steps: int) -> TelechatMonitor:
    monitor = TelechatMonitor()
    begun = SimpleNamespace(original_args=lambda: SimpleNamespace(train_network=network))
    monitor.begin(begun)
    for step in range(1, steps + 1):
        monitor.step_end(context(step, wrapped(2.0)))
    return monitor


def test_each_step_logs_the_busiest_and_the_idlest_expert_and_what_was_dropped(report):
    """Relative to a fair share of 1/4: 0.55 is 2.2 of it, 0.1 is 0.4; dropped are 5% and 15%."""
    train(Network(LOADS), 2)
    assert report.lines == [
        f"{{ step {step}, experts: busiest 2.20 of a fair share (layer 11, expert 1), idlest 0.40 "
        "(layer 11, expert 0), dropped choices 10.00%, at most 15.00% (layer 11) }"
        for step in (1, 2)
    ]


def test_tensorboard_shows_every_layer(report):
    train(Network(LOADS), 1)
    expected = {
        "experts/busiest/layer_3": 1.2, "experts/idlest/layer_3": 0.8, "experts/dropped/layer_3": 0.05,
        "experts/busiest/layer_11": 2.2, "experts/idlest/layer_11": 0.4, "experts/dropped/layer_11": 0.15,
    }  # fmt: skip
    assert report.scalars == pytest.approx({(tag, 1): value for tag, value in expected.items()}, rel=1e-5)


def test_nothing_dropped_is_nothing(report):
    train(Network({0: [[0.5, 0.5], [0.5, 0.5]]}), 1)
    assert "dropped choices 0.00%, at most 0.00%" in report.lines[0]
    assert report.scalars["experts/dropped/layer_0", 1] == 0.0


def test_without_tensorboard_the_log_remains(report, monkeypatch):
    monkeypatch.setattr(telechat_callback, "get_tensorboard_writer", lambda: None)
    train(Network(LOADS), 1)
    assert len(report.lines) == 1 and not report.scalars


def test_a_dense_model_has_no_experts_to_report(report):
    train(Network({}), 3)
    assert report.lines == [] and report.scalars == {}


def test_loads_are_those_of_the_step_that_ended(report):
    network = Network({0: [[0.5, 0.5], [0.5, 0.5]]})
    monitor = train(network, 1)
    network.all[0].set_data(Tensor(np.array([[0.75, 0.25], [0.5, 0.25]], np.float32)))
    monitor.step_end(context(2, wrapped(2.0)))
    busiest = [report.scalars["experts/busiest/layer_0", step] for step in (1, 2)]
    assert busiest == [1.0, 1.5]
    assert report.scalars["experts/dropped/layer_0", 2] == 0.25


def test_the_loads_of_a_model_are_found_by_its_layers():
    from mindspore.nn.utils import no_init_parameters

    from research.telechat2.telechat import TelechatForCausalLM
    from research.telechat2.telechat_config import TelechatConfig

    sizes = {"num_layers": 12, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8, "vocab_size": 8}
    with no_init_parameters():
        model = TelechatForCausalLM(
            TelechatConfig(**sizes, compute_dtype="float32", moe_config={"expert_num": 4})
        )
    loads = telechat_callback.expert_loads(nn.CellList([model]))  # as a part of the step's network
    assert list(loads) == list(range(12))
    assert all(load is model.model.layers[i].feed_forward.expert_load for i, load in loads.items())
