"""The one check of a YAML with its overrides, called by every command before anything else is done."""

from collections.abc import Callable
from pathlib import Path

from research.telechat2.common.problems import noted_in, refuse
from research.telechat2.config.foreign_code import settle_classes
from research.telechat2.config.key_check import read_keys
from research.telechat2.config.migration import leave_out, missing_files
from research.telechat2.config.optimization import check_seed


def check_settings(
    settings: dict,
    *,
    register: Path | None = None,
    source: object = "the YAML",
    here: bool = False,
    plan: Callable[[dict], object] | None = None,
) -> list[str]:
    """Read all settings by their kinds, and refuse foreign code and what nothing reads, all at once.

    Args:
        settings: the YAML with overrides, not yet completed by MindFormers' defaults. Changed in place: what
            has no effect is taken out, text that is a number becomes one.
        register: see settle_classes.
        source: the file, for the message.
        here: the run is started now, so that the files it reads must be on this machine.
        plan: the check of what the settings come to, which the command makes later; called here only where
            something is to be changed already, so that its errors are in the same list.

    Returns:
        A note for each setting that has no effect.

    Raises:
        UsageError: lists all settings that are to be changed; or no random numbers begin at the seed.
    """
    notes, problems = leave_out(settings)
    problems += settle_classes(settings, register)
    unread, misread = read_keys(settings)
    problems += unread + misread
    (problems if here else notes).extend(missing_files(settings))
    if plan and problems and not misread:
        with noted_in(problems):
            plan(settings)
    refuse(problems, source)
    check_seed(settings.get("seed"))
    return notes
