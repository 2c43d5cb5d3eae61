"""Which of a run's processes this is, before they have met."""

import os


def is_first_process() -> bool:
    """Whether this process speaks, locks and writes for all: rank 0, or the only one; never the scheduler."""
    return os.environ.get("MS_ROLE") != "MS_SCHED" and os.environ.get("RANK_ID", "0") == "0"
