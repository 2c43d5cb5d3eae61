"""Whether MindFormers refused a user's setting, or code of ours failed."""

import traceback
from pathlib import Path

import mindformers
import mindspore

from research.telechat2.config.yaml_files import CHECKOUT

_LIBRARY, _OURS = Path(mindformers.__file__).parent, CHECKOUT / "research"
_COMPILER = Path(mindspore.__file__).parent / "graph"


def is_refusal(error: BaseException) -> bool:
    """Whether the code that raised ``error`` is MindFormers', or was called by it and is not ours.

    MindFormers raises the error of a constructor anew, so the first one is looked at. An error in the
    compilation of a graph is none of a setting.
    """
    while (first := error.__cause__ or error.__context__) and type(first) is type(error):
        error = first
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(_COMPILER) or file.is_relative_to(_OURS):
            return False
        if file.is_relative_to(_LIBRARY):
            return True
    return False
