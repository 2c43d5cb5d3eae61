"""A checkpoint that cannot be saved leaves the earlier ones as they were, and says why."""

from collections import namedtuple

import pytest
from refusal import refused
from saved_iterations import save_iteration

from research.telechat2.run import space
from research.telechat2.run.checkpoint_monitor import saving
from research.telechat2.run.resuming import whole_iterations

Usage = namedtuple("Usage", "total used free")
TRACKER = "latest_checkpointed_iteration.txt"


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    earlier = save_iteration(tmp_path, 4)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(10**9, 0, 3_000_000))
    too_large = saving(tmp_path / "iteration_00000008", 5_000_000)
    with refused("iteration_00000008", "5.0 MB", "3.0 MB", kind=OSError), too_large:
        pytest.fail("nothing may be written")
    assert whole_iterations(tmp_path) == [earlier]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
        ZeroDivisionError(),
    ],
)
def test_a_save_that_fails_half_way_is_undone(tmp_path, failure):
    earlier = save_iteration(tmp_path, 4)
    expected = OSError if "No space" in str(failure) else type(failure)
    with pytest.raises(expected) as found, saving(tmp_path / "iteration_00000008", 10):
        save_iteration(tmp_path, 8)
        (tmp_path / TRACKER).write_text("")  # as MindFormers leaves it where the last write fails
        raise failure
    if expected is OSError:
        assert str(tmp_path / "iteration_00000008") in str(found.value) and "10 bytes" in str(found.value)
    assert (tmp_path / TRACKER).read_text() == "4"
    assert sorted(path.name for path in tmp_path.iterdir()) == [earlier.name, TRACKER]


def test_the_first_save_that_fails_leaves_no_tracker(tmp_path):
    with pytest.raises(OSError), saving(tmp_path / "iteration_00000008", 10):
        save_iteration(tmp_path, 8)
        raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())
