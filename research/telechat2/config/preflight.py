"""The one check of a YAML with its overrides, called by every command before anything else is done."""

from pathlib import Path

from research.telechat2.config.foreign_code import settle_classes
from research.telechat2.config.key_check import read_keys
from research.telechat2.config.migration import leave_out, missing_files


def check_settings(
    settings: dict, *, register: Path | None = None, source: object = "the YAML", here: bool = False
) -> list[str]:
    """Read all settings by their kinds, and refuse foreign code and what nothing reads, all at once.

    Args:
        settings: the YAML with overrides, not yet completed by MindFormers' defaults. Changed in place: what
            has no effect is taken out, text that is a number becomes one.
        register: see settle_classes.
        source: the file, for the message.
        here: the run is started now, so that the files it reads must be on this machine.

    Returns:
        A note for each setting that has no effect.

    Raises:
        ValueError: lists all settings that are to be changed.
    """
    notes, problems = leave_out(settings)
    problems += settle_classes(settings, register)
    problems += read_keys(settings)
    (problems if here else notes).extend(missing_files(settings))
    refuse(problems, source)
    return notes


def refuse(problems: list[str], source: object) -> None:
    """Raise one ValueError for all ``problems``, sentences; none for none."""
    if not problems:
        return
    if len(problems) == 1:
        raise ValueError(f"{source}: {problems[0]}")
    listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
    raise ValueError(f"{source}: {len(problems)} settings are to be changed:\n{listed}")
