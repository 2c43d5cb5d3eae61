"""TelechatMonitor: counts steps that trained nothing, keeps and draws the losses, and reports on experts."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from refusal import refused

from research.telechat2.compat import library
from research.telechat2.compat.library import MFLossMonitor
from research.telechat2.run import metrics
from research.telechat2.run import monitor as run_monitor
from research.telechat2.run.metrics import draw_loss_curve, read_metrics
from research.telechat2.run.monitor import TelechatMonitor


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
    monkeypatch.setattr(run_monitor, "logger", logger)
    return found


@pytest.fixture(autouse=True)
def output(monkeypatch, tmp_path):
    monkeypatch.setattr(run_monitor, "output_directory", lambda: str(tmp_path / "out"))
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


def run_context(step: int, outputs, initial_step: int = 0, micro_batches: int = 1):
    """What MindSpore tells a callback, with the loss monitor of a run of 4 epochs of 5 steps."""
    loss_monitor = MFLossMonitor(origin_epochs=4, dataset_size=5, initial_step=initial_step)
    loss_monitor.mirco_size = micro_batches
    params = SimpleNamespace(
        cur_step_num=step,
        net_outputs=outputs,
        list_callback=[loss_monitor],
        train_network=Network({}),
    )
    return SimpleNamespace(original_args=lambda: params)


def trained(steps: range, initial_step: int = 0, history=None) -> TelechatMonitor:
    """A monitor that has seen steps; MindSpore counts those of this run."""
    monitor = TelechatMonitor(history)
    monitor.begin(run_context(0, None, initial_step=initial_step))
    for step in steps:
        monitor.step_end(run_context(step - initial_step, wrapped(4.0 / step)))
    return monitor


def test_the_curve_is_drawn_at_the_end_and_not_after_each_step(output, capsys):
    from PIL import Image

    monitor = trained(range(1, 6))
    assert not (output / "loss_curve.png").exists()  # the steps took less than a minute
    monitor.finish()  # as run() does for a run that is interrupted
    with Image.open(output / "loss_curve.png") as image:
        assert image.format == "PNG" and image.size[0] >= 640
    assert sorted(path.name for path in output.iterdir()) == ["loss_curve.png", "metrics.jsonl"]


def test_an_old_picture_is_drawn_anew_beside_the_training(output):
    monitor = trained(range(1, 3))
    monitor.metrics._drawn -= 1000  # seconds
    monitor.step_end(run_context(3, wrapped(1.0)))
    monitor.metrics._thread.join()
    assert (output / "loss_curve.png").is_file()


def test_a_resumed_run_goes_on_with_the_curve(output, tmp_path, capsys):
    trained(range(1, 8)).finish()
    lines = (output / "metrics.jsonl").read_text().splitlines()
    (output / "metrics.jsonl").rename(tmp_path / "first.jsonl")
    monitor = trained(range(6, 8), initial_step=5, history=str(tmp_path / "first.jsonl"))
    assert monitor.steps == [6, 7] and monitor.metrics.steps == [1, 2, 3, 4, 5, 6, 7]
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert found[:5] == [json.loads(line) for line in lines[:5]]
    assert [step["step"] for step in found] == [1, 2, 3, 4, 5, 6, 7]
    assert "training: 20 steps (4 epochs of 5), going on after step 5" in capsys.readouterr().out


def test_without_the_first_steps_their_picture_is_left_alone(output):
    output.mkdir()
    (output / "loss_curve.png").write_bytes(b"the first run's")
    trained(range(11, 13), initial_step=10).finish()
    assert (output / "loss_curve.png").read_bytes() == b"the first run's"
    assert (output / "loss_curve_from_step_11.png").stat().st_size > 1000


def test_in_the_same_folder_the_steps_after_the_checkpoint_are_replaced(output):
    trained(range(1, 8)).finish()
    monitor = trained(range(4, 6), initial_step=3, history=str(output / "metrics.jsonl"))
    assert monitor.metrics.steps == [1, 2, 3, 4, 5]
    assert [path.name for path in output.glob("metrics*")] == ["metrics.jsonl"]


def test_a_new_run_in_the_folder_of_one_that_saved_nothing_keeps_its_numbers(output):
    trained(range(1, 3))
    trained(range(1, 2))
    assert len((output / "metrics_1.jsonl").read_text().splitlines()) == 2
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_line_cut_by_a_kill_is_left_out_and_a_foreign_one_is_named(output, tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1, "loss": "nan"}\n{"step": 2, "lo')
    steps = read_metrics(file)
    assert [step["step"] for step in steps] == [1] and np.isnan(steps[0]["loss"])
    file.write_text('hello\n{"step": 2, "loss": 1.0}\n')
    with refused("line 1", "hello"):
        read_metrics(file)


def test_numbers_that_are_not_finite_are_kept_and_named_once(messages, output):
    monitor = trained(range(0))
    for step, loss in enumerate([1.0, float("nan"), float("inf"), 2.0], start=1):
        monitor.step_end(run_context(step, (Tensor(loss), Tensor(loss != loss), None, Tensor(0.5))))
    told = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [step["loss"] for step in told] == [1.0, "nan", "inf", 2.0]
    assert [step["learning_rate"] for step in told] == [0.5] * 4 and told[0]["grad_norm"] is None
    assert [message.split()[1:4] for message in messages] == [["loss", "of", "step"], ["2", "is", "left"]]
    monitor.end(run_context(4, None))
    assert messages[-1].startswith("1 of 4 steps were left out")
    monitor.check_end()  # the last loss is a number


def test_a_run_that_ends_without_a_loss_fails(messages, output):
    monitor = trained(range(0))
    for step, loss in enumerate([1.0, float("nan"), 2.0, float("nan"), float("nan")], start=1):
        monitor.step_end(run_context(step, (Tensor(loss), Tensor(False), None, Tensor(0.5))))
    with refused("step 4", "nan", "step 5"):
        monitor.check_end()
    TelechatMonitor().check_end()  # nothing was trained


def test_a_learning_rate_that_is_no_number_ends_the_run(messages, output):
    """The optimizer has multiplied the weights by it."""
    monitor = trained(range(0))
    with refused("step 1", "nan", "lr_schedule"):
        monitor.step_end(run_context(1, (Tensor(1.0), Tensor(False), None, Tensor(float("nan")))))
    assert json.loads((output / "metrics.jsonl").read_text())["learning_rate"] == "nan"


def test_a_full_disk_costs_the_numbers_and_not_the_training(output, capsys, monkeypatch):
    monitor = trained(range(1, 2))
    monitor.metrics.path = monitor.metrics.picture = Path("/dev/full/no")
    for step in (2, 3):
        monitor.step_end(run_context(step, wrapped(1.0)))
    monitor.finish()
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert monitor.steps == [1, 2, 3]


def test_many_steps_are_drawn_as_means(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, *xy, **how: drawn.append(xy))
    monkeypatch.setattr(metrics, "POINTS", 4)
    draw_loss_curve(list(range(1, 10)), [float(n) for n in range(1, 10)], tmp_path / "c.png")
    assert [list(values) for values in drawn[0]] == [[2.0, 5.0, 8.0]] * 2  # threes


@pytest.mark.parametrize(("stages", "rank", "size", "reports"), [(1, 0, 8, True), (1, 7, 8, False),
    (4, 0, 8, False), (4, 7, 8, True), (4, 6, 8, False)])  # fmt: skip
def test_a_process_of_the_stage_with_the_loss_reports(monkeypatch, stages, rank, size, reports, capsys):
    """Two ranks a stage; MindFormers, too, names the last card's loss the valid one."""
    pipeline(monkeypatch, stages, rank, size)
    monitor = trained(range(1, 3))
    assert monitor.reports == reports and bool(monitor.steps) == reports
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/20")]
    assert len(lines) == (reports or rank == 0)  # the first worker shows the progress, without a loss
    assert all(("known to the last stage" in line) == (not reports) for line in lines)


def pipeline(monkeypatch, stages: int, rank: int, size: int) -> None:
    settings = {"pipeline_stages": stages, "pipeline_scheduler": "1f1b"}
    monkeypatch.setattr(library.ms, "get_auto_parallel_context", settings.get)
    monkeypatch.setattr(library.ms.context, "get_auto_parallel_context", settings.get)
    for name, value in (("get_real_rank", rank), ("get_real_group_size", size)):
        monkeypatch.setattr(library, name, lambda value=value: value)
    monkeypatch.setattr(run_monitor, "get_real_rank", lambda: rank)
    monkeypatch.setattr(run_monitor, "is_main_rank", lambda: rank == 0)


def test_the_loss_of_a_pipeline_is_the_mean_of_its_micro_batches(monkeypatch):
    """Without calculate_per_token_loss the wrapper returns their sum; MFLossMonitor divides, and so do we."""
    pipeline(monkeypatch, 2, 1, 2)
    monitor = TelechatMonitor()
    monitor.step_end(run_context(1, wrapped(8.0), micro_batches=4))
    assert monitor.losses == [2.0]


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
    monkeypatch.setattr(run_monitor, "library_logger", logger)
    monkeypatch.setattr(run_monitor, "get_tensorboard_writer", lambda: writer)
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
    monkeypatch.setattr(run_monitor, "get_tensorboard_writer", lambda: None)
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


def test_a_stage_reports_the_experts_of_its_own_layers_only(report, monkeypatch):
    """Those of other stages stay 0, or are what a checkpoint held."""
    pipeline(monkeypatch, 2, 1, 2)
    network = Network(LOADS)
    network.layers = nn.CellDict({"3": nn.Cell(), "11": nn.Cell()})
    network.layers["3"].pipeline_stage, network.layers["11"].pipeline_stage = 0, 1
    train(network, 1)
    assert "busiest 2.20" in report.lines[0] and "dropped choices 15.00%" in report.lines[0]
    assert {tag.rsplit("_", 1)[1] for tag, _ in report.scalars} == {"11"}


def test_the_loads_of_a_model_are_found_by_its_layers():
    from mindspore.nn.utils import no_init_parameters

    from research.telechat2.telechat import TelechatForCausalLM
    from research.telechat2.telechat_config import TelechatConfig

    sizes = {"num_layers": 12, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8, "vocab_size": 8}
    with no_init_parameters():
        model = TelechatForCausalLM(
            TelechatConfig(**sizes, compute_dtype="float32", moe_config={"expert_num": 4})
        )
    loads = run_monitor.expert_loads(nn.CellList([model]))  # as a part of the step's network
    assert list(loads) == list(range(12))
    assert all(load is model.model.layers[i].feed_forward.expert_load for i, load in loads.items())
