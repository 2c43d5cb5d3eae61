"""Takes back what MindFormers' loaders say of parameters that no checkpoint needs to hold.

They warn of every parameter they do not find, the key/value caches and the experts' statistics too, which the
model fills itself. A warning that names a weight stands.
"""

import re
from logging import LogRecord

from research.telechat2.checkpoint.loading import NO_WEIGHTS


def hush_loaders() -> None:
    """Filter the warnings of MindSpore and MindFormers, from now on; after ``set_output_path``."""
    from mindspore.log import _get_logger

    from research.telechat2.telechat_compat import get_logger

    for logger in (_get_logger(), get_logger()):
        logger.addFilter(is_worth_saying)


def is_worth_saying(record: LogRecord) -> bool:
    """Whether a message is anything but a complaint that parameters of ``NO_WEIGHTS`` are not loaded."""
    message = record.getMessage()
    if "parameters in the 'net' are not loaded" in message:
        return False  # only their number: the next message names them
    found = re.fullmatch(
        r"No source parameters found for dst_param: (.+), skipping|\[(.*)\] are not loaded\.", message
    )
    if not found:
        return True
    names = [name.strip(" '") for name in (found[1] or found[2]).split(",")]
    return not all(name.endswith(NO_WEIGHTS) for name in names)
