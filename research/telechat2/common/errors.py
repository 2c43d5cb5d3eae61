"""The error that a user can cause."""


class UsageError(ValueError):
    """What a user can mend: the message says what was found, what was expected and what to do.

    Commands print it without traceback; any other ValueError is a defect of ours.
    """
