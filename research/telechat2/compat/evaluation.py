"""Where MindFormers 1.9 makes the data set of an evaluation, and how ours takes that place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mindformers.dataset import CausalLanguageModelDataset
from mindformers.trainer.base_trainer import BaseTrainer


@contextmanager
def evaluating_on(create: Callable) -> Iterator[None]:
    """Have the Trainer evaluate on ``create(config, shard)``; on its own data set where that is None.

    Batch size and share of a process, (its number, how many there are), stay those of MindFormers.
    """
    before = BaseTrainer.create_dataset

    def create_dataset(trainer, is_train=True, default_args=None):
        if not is_train and trainer.eval_dataset is None:
            CausalLanguageModelDataset.init_dataset_config(trainer.config.eval_dataset)
            number, shards = CausalLanguageModelDataset._generate_shard_info()  # noqa: SLF001
            if (data := create(trainer.config, (number or 0, shards or 1))) is not None:
                return data
        return before(trainer, is_train, default_args)

    BaseTrainer.create_dataset = create_dataset
    try:
        yield
    finally:
        BaseTrainer.create_dataset = before
