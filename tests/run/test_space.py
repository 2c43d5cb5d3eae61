"""Whether checkpoints fit: known before the training starts."""

from collections import namedtuple

import pytest
from refusal import refused

from research.telechat2.run import space
from research.telechat2.run.space import check_space, checkpoint_bytes, kept_checkpoints

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    def set_free(count: int) -> None:
        monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(10**9, 0, count))

    return set_free


def config(dtype="float32", **section) -> dict:
    return {"model": {"model_config": {"param_init_type": dtype}}, "checkpoint": section or None}


def test_a_checkpoint_is_weights_and_two_moments():
    assert checkpoint_bytes(100, config(no_save_optim=False)) == 1200
    assert checkpoint_bytes(100, config(no_save_optim=True)) == 400
    assert checkpoint_bytes(100, config("bfloat16", no_save_optim=False)) == 1000
    assert checkpoint_bytes(100, config()) == 1200  # without the section everything is saved


@pytest.mark.parametrize(
    ("steps", "every", "most", "expected"),
    [(10, 4, 5, 3), (100, 1, 2, 3), (3, 1000, 5, 1), (None, 10, 5, 6)],
)
def test_one_more_than_kept_lies_on_the_disk(steps, every, most, expected):
    section = {"save_interleaved_steps": every, "save_max": most}
    assert kept_checkpoints({"checkpoint": section}, steps) == expected
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": every, "keep_checkpoint_max": most}
    assert kept_checkpoints({"callbacks": [{"type": "MFLossMonitor"}, monitor]}, steps) == expected


def test_what_cannot_fit_is_refused_and_what_may_not_is_told(free, tmp_path):
    folder = tmp_path / "not" / "there"
    free(5_000_000)
    with refused("6.0 MB", "5.0 MB", "--output_dir"):
        check_space(folder, 6_000_000, 1)
    assert check_space(folder, 2_000_000, 2) is None
    told = check_space(folder, 2_000_000, 3)
    assert "5.0 MB free, and 3 checkpoints of about 2.0 MB need 6.0 MB" in told
    assert check_space(folder, 6_000_000, 0) is None  # nothing is saved
