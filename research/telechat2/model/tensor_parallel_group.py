"""Tensor parallelism of prediction: processes that each hold a slice of every large matrix of one model.

A rank has its share of the heads, of the feed-forward width (of every expert's, too) and of the vocabulary.
It computes with the same cells as the whole model, which are told who shares their weights; where a sum runs
over something that is shared, the ranks add up their summands, and every rank goes on with the same numbers.
"""

from dataclasses import dataclass

from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.common.errors import UsageError
from research.telechat2.compat.library import process_group


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model's weights; by default there is one, which has all.

    Attributes:
        size: how many, n.
        rank: which of them this process is, 0 to n - 1; it holds the rank-th of n equal parts.
        group: MindSpore's name of their communication group.
    """

    size: int = 1
    rank: int = 0
    group: str = ""

    def sum(self) -> P.AllReduce:
        """The operator that adds up what the ranks have; for several of them only."""
        return P.AllReduce(group=self.group)

    def gather(self) -> P.AllGather:
        """The operator that puts what the ranks have one after the other, along the first axis."""
        return P.AllGather(group=self.group)


ALONE = Ranks()


def ranks_of(config) -> Ranks:
    """The ranks of ``parallel_config.model_parallel``, which are all processes of this run.

    Raises:
        UsageError: another number of processes runs.
    """
    size = config.parallel_config.model_parallel
    processes, rank, group = process_group()
    if processes != size:
        raise UsageError(
            f"parallel_config.model_parallel is {size}, but this run has {processes} "
            f"{'process' if processes == 1 else 'processes'}; prediction has one process for each part of "
            f"the model. Start {size} by scripts/msrun_launcher.sh with use_parallel True, or set "
            f"parallel_config.model_parallel: {processes}."
        )
    return Ranks(size, rank, group) if size > 1 else ALONE
