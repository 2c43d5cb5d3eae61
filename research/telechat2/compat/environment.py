"""What MindFormers reads from the environment when it is imported."""

import os
import sys
from pathlib import Path

from research.telechat2.common.interrupts import temporary_folder
from research.telechat2.config.yaml_files import CHECKOUT


def prepare_environment(output_dir: str, register: Path) -> None:
    """Set what MindFormers reads from the environment when it is imported.

    The copies that MindFormers makes of registered modules go to a directory of this process, which is
    removed at its end: on them several ranks would race, and in a user's folder they are litter.
    """
    output = Path(output_dir).expanduser().absolute()
    os.environ["LOCAL_DEFAULT_PATH"] = str(output)
    os.environ.setdefault("MS_OM_PATH", str(output / "log"))  # MindSpore's rank_N/om of a failed compilation
    os.environ["REGISTER_PATH"] = str(register)
    if "OM_MODULES_CACHE" not in os.environ:
        os.environ["OM_MODULES_CACHE"] = temporary_folder("telechat_modules_")
    for folder in (str(register), str(CHECKOUT)):
        if folder not in sys.path:
            sys.path.append(folder)
