"""Several errors of one check as one error, so that nobody mends a file a line at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from research.telechat2.common.errors import UsageError


class SettingsError(UsageError):
    """One error or several; ``found``: the message of each, none twice."""

    def __init__(self, found: list[str] | str, source: object = None):
        """``source``: the file that messages name; None: none. MindFormers raises it again with a text."""
        self.found = (found,) if isinstance(found, str) else tuple(dict.fromkeys(found))
        at = f"{source}: " if source is not None else ""
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.found, 1))
        one = len(self.found) == 1
        super().__init__(
            f"{at}{self.found[0]}" if one else f"{at}{len(self.found)} settings are to be changed:\n{listed}"
        )


def problems_of(error: UsageError) -> list[str]:
    """The messages of an error."""
    return list(error.found) if isinstance(error, SettingsError) else [str(error)]


@contextmanager
def noted_in(found: list[str]) -> Iterator[None]:
    """Add a UsageError of the block to ``found`` instead of raising it."""
    try:
        yield
    except UsageError as error:
        found += problems_of(error)


def refuse(found: list[str], source: object = None) -> None:
    """Raise ``SettingsError`` if there are any."""
    if found:
        raise SettingsError(found, source)


def check_all(*checks: tuple[Any, ...]) -> None:
    """Call every check, a tuple of a function and its arguments, also after one has raised a UsageError.

    Raises:
        UsageError: of all checks together.
    """
    found: list[str] = []
    for check, *arguments in checks:
        with noted_in(found):
            check(*arguments)
    refuse(found)
