"""Where MindFormers 1.9 lets a run start, once it has opened the data.

Its Trainer counts whole epochs by the checkpoint's epoch, whatever the length of an epoch is now; here
they are counted by the steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from research.telechat2.compat.library import base_trainer
from research.telechat2.run.checkpoint_monitor import complete_record
from research.telechat2.run.resuming import initial_epoch

# steps done, steps of an epoch, records of a step, MindFormers' factor of the steps for another batch
Check = Callable[[int, int, int, float], None]


@contextmanager
def starting_right(check: Check | None) -> Iterator[None]:
    """Around the Trainer: complete the record; where a run resumes, call ``check`` before the model is built.

    Raises:
        UsageError: of ``check``.
    """
    before = base_trainer.check_runner_config

    def checked(config, dataset):
        before(config, dataset)
        runner = config.runner_config
        complete_record(config.data_size, runner.global_batch_size)
        if check is not None:
            factor = getattr(runner, "step_scale", None) or 1.0
            check(runner.initial_step, config.data_size, runner.global_batch_size, factor)
        if runner.initial_step:  # in every process
            sink_size = runner.sink_size if runner.sink_mode else 0
            runner.initial_epoch = initial_epoch(runner.initial_step, config.data_size, sink_size)

    base_trainer.check_runner_config = checked
    try:
        yield
    finally:
        base_trainer.check_runner_config = before
