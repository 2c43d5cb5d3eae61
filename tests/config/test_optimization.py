"""Learning rate, optimizer and length of a training: what is refused, and that legal settings are not."""

import re
from pathlib import Path

import pytest
import yaml
from refusal import refused

from research.telechat2.config.optimization import (
    check_optimization,
    check_schedule_length,
    with_float_fields,
)
from research.telechat2.config.yaml_files import read_config, shipped_configs

MIGRATION = Path(__file__).resolve().parents[3] / "shared" / "data" / "migration"


def schedule(**settings) -> dict:
    return {"lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 1e-4} | settings}


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (schedule(learning_rate=1e-5, lr_end=1e-4), ("lr_end", "0.0001", "learning_rate 1e-05")),
        (schedule(warmup_lr_init=1e-3), ("warmup_lr_init", "0.001", "learning_rate 0.0001")),
        ({"lr_schedule": {"base_lr": 1e-5, "eta_min": 1e-4}}, ("eta_min", "0.0001", "base_lr 1e-05")),
        (schedule(learning_rate=-1e-4), ("learning_rate", "-0.0001")),
        (schedule(learning_rate=float("inf")), ("learning_rate", "inf")),
        (schedule(lr_end=float("nan")), ("lr_end", "nan")),
        (schedule(learning_rate="1e-5"), ("learning_rate", "'1e-5'")),
        (schedule(warmup_steps=100, warmup_ratio=0.05), ("warmup_steps 100", "warmup_ratio 0.05", "null")),
        (schedule(warmup_steps=100, warmup_ratio=0.0), ("warmup_steps 100", "warmup_ratio 0.0")),
        (schedule(decay_steps=10, decay_ratio=0.5), ("decay_steps 10", "decay_ratio 0.5")),
        (schedule(warmup_steps=-1), ("warmup_steps", -1)),
        (schedule(warmup_steps=0.1), ("warmup_steps", "0.1")),
        (schedule(warmup_ratio=5), ("warmup_ratio", 5)),
        (schedule(warmup_epochs=1, warmup_ratio=0.1), ("warmup_epochs", 1)),
        (schedule(total_steps=0), ("total_steps", 0)),
        (schedule(total_steps=-2), ("total_steps", -2)),
        (schedule(num_cycles=0), ("num_cycles", 0)),
        ({"grouped_lr_schedule": {"default": {"learning_rate": 1e-5, "lr_end": 1}}}, ("default.lr_end", 1)),
        (
            {"grouped_lr_schedule": {"default": {}, "grouped": [{"learning_rate": -1, "params": ["x"]}]}},
            ("[0]", "learning_rate", -1),
        ),
        (
            schedule() | {"optimizer": {"learning_rate": 1e-3}},
            ("optimizer.learning_rate", "0.001", "lr_schedule.learning_rate", "0.0001"),
        ),
        (schedule(type="CosineAnnealingLR", base_lr=1e-3), ("learning_rate 0.0001", "base_lr 0.001")),
        ({"run_mode": "finetune"}, ("lr_schedule.learning_rate", "5e-05")),
        (
            {"run_mode": "train", "lr_schedule": {"type": "cosine"}},
            ("lr_schedule.learning_rate",),
        ),
        (
            {"run_mode": "train", "optimizer": {"learning_rate": 1e-3}},
            ("--lr_schedule.learning_rate 0.001",),
        ),
        ({"optimizer": {"betas": [0.9]}}, ("betas", "[0.9]")),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ("betas", "[1]", "1.0")),
        ({"optimizer": {"betas": [-0.9, 0.95]}}, ("betas", "[0]", "-0.9")),
        ({"optimizer": {"eps": 0}}, ("eps", 0)),
        ({"optimizer": {"weight_decay": -0.1}}, ("weight_decay", "-0.1")),
        ({"optimizer": {"weight_decay": float("nan")}}, ("weight_decay", "nan")),
        ({"runner_wrapper": {"use_clip_grad": True, "max_grad_norm": -1.0}}, ("max_grad_norm", "-1.0")),
        ({"runner_wrapper": {"scale_sense": 0}}, ("scale_sense", 0)),
        ({"runner_config": {"epochs": 0}}, ("epochs", 0)),
        ({"runner_config": {"epochs": 1.5}}, ("epochs", "1.5")),
        ({"runner_config": {"batch_size": -2}}, ("batch_size", -2)),
        ({"runner_config": {"sink_size": 0}}, ("sink_size", 0)),
        ({"checkpoint": {"save_interleaved_steps": 0}}, ("save_interleaved_steps", 0)),
        ({"checkpoint": {"save_max": -5}}, ("save_max", -5)),
        ({"train_dataset": {"data_loader": {"num_samples": 0}}}, ("num_samples", 0)),
        ({"seed": -1}, ("seed", -1)),
    ],
)
def test_what_trains_otherwise_than_meant_is_refused_with_its_values(settings, found):
    with refused(*found):
        check_optimization(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        schedule(lr_end=1e-4),  # a constant rate
        schedule(lr_end=0, warmup_lr_init=0, num_cycles=1),
        schedule(warmup_steps=None, warmup_ratio=0.05),
        schedule(warmup_steps=100, warmup_ratio=None, total_steps=1.0e6),
        schedule(warmup_steps=0, warmup_ratio=0.0),
        schedule(lr_end=1e-3) | {"lr_scale": True},  # multiplied by the batch size first
        {"optimizer": {"betas": (0.9, 0.999), "eps": 1, "weight_decay": 0}},
        {"optimizer": {"type": "Came", "eps": [1e-30, 1e-3]}},
        {"runner_wrapper": {"scale_sense": {"type": "DynamicLossScaleUpdateCell"}}},
        {"runner_config": {"sink_size": -1, "gradient_accumulation_steps": None}},
        {"optimizer": None, "lr_schedule": None},
    ],
)
def test_what_is_legal_is_not_refused(settings):
    check_optimization(settings)


def test_all_shipped_yamls_and_those_of_migrating_users_pass():
    own = [read_config(path) for path in shipped_configs()]
    others = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(MIGRATION.glob("*.yaml"))]
    assert len(own) > 15
    for settings in own + others:
        check_optimization(settings)


def test_the_schedule_is_compared_with_the_length_of_the_run():
    assert check_schedule_length(schedule(total_steps=-1, warmup_ratio=0.1), 50) == []
    for total, said in ((20, "is 20, and the run has 50 steps.*stays"), (90, "is 90, .* does not reach")):
        (note,) = check_schedule_length(schedule(total_steps=total), 50)
        assert re.search(said, note)
    (note,) = check_schedule_length(schedule(warmup_steps=2000), 50)
    assert "2000" in note and "50" in note
    assert "takes 100 steps" in check_schedule_length(schedule(total_steps=1000, warmup_ratio=0.1), 50)[0]
    assert check_schedule_length(schedule(warmup_steps=1), 1) == []


def test_whole_numbers_become_the_floats_that_mindformers_takes():
    found = with_float_fields({"type": "AdamW", "weight_decay": 0, "eps": 1e-8})
    assert found == {"type": "AdamW", "weight_decay": 0.0, "eps": 1e-8}
    assert isinstance(found["weight_decay"], float)


@pytest.mark.parametrize(("warmup", "steps"), [({"warmup_ratio": 0.05}, 10), ({"warmup_steps": 0}, 100)])
def test_a_stable_rate_without_warm_up_is_refused(warmup, steps):
    """MindFormers computes it as rate * step / step, which is NaN at step 0, and so are the weights."""
    settings = schedule(type="WarmUpStableDecayLR", decay_start_ratio=0.5, **warmup)
    with refused("WarmUpStableDecayLR", "warmup_steps 1"):
        check_schedule_length(settings, steps)
    check_schedule_length(settings, 20 * steps) if "warmup_ratio" in warmup else None
    cosine = schedule(**warmup)
    assert check_schedule_length(cosine, steps) == []


def test_a_number_that_no_float_holds():
    with refused("lr_schedule.learning_rate", "a number", 0):
        check_optimization(schedule(learning_rate=10**400))
