"""The file of a folder for MindIE that MindFormers loads: settings, model and tokenizer as MindIE calls them.

MindFormers executes a copy of this file, which lies elsewhere. So this file finds the folder that MindFormers
was asked for, and takes the code from ``research/`` in it. A folder without code uses the installed plugin.
"""

import importlib
import inspect
import sys
from pathlib import Path


def served_folder() -> Path:
    """The folder that MindFormers loads, an argument of its function that calls this file."""
    frame = inspect.currentframe()
    while frame is not None and "pretrained_model_name_or_path" not in frame.f_locals:
        frame = frame.f_back
    return Path(frame.f_locals["pretrained_model_name_or_path"] if frame else __file__).absolute()


folder = served_folder()
if Path(folder, "research").is_dir() and str(folder) not in sys.path:
    sys.path.insert(0, str(folder))  # before an installed plugin
    sys.dont_write_bytecode = True  # in the folder, whose modes MindIE checks
# Not by an import statement: MindFormers looks for what those name before it executes the file.
classes = importlib.import_module("research.telechat2.serve.mindie.classes")

MindIETelechatConfig = classes.MindIETelechatConfig
MindIETelechatForCausalLM = classes.MindIETelechatForCausalLM
MindIETelechatTokenizer = classes.MindIETelechatTokenizer
