"""The error that a user can cause."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """What a user can correct: the message says what was found, what was expected and what to do.

    Commands print it without traceback; any other ValueError is a defect of ours.
    """


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Begin the message of a UsageError of the block with ``where``, the file that it is about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
