"""What a test asserts of an error that a user caused: its type, and the values it names; not its prose."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from research.telechat2.common.errors import UsageError


@contextmanager
def refused(*values: object, kind: type[Exception] = UsageError) -> Iterator[pytest.ExceptionInfo]:
    """The block raises ``kind``, whose message holds each value as ``str`` writes it."""
    with pytest.raises(kind) as raised:
        yield raised
    message = str(raised.value)
    missing = [str(value) for value in values if str(value) not in message]
    assert not missing, f"the message lacks {missing}:\n{message}"
