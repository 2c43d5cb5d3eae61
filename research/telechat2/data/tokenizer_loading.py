"""Loading the tokenizer in commands that need nothing else of MindFormers."""

import logging
import os
import tempfile
from pathlib import Path


def load_tokenizer(vocab_file: str | Path):
    """Return a TelechatTokenizer, without MindFormers' log folder and MindSpore's warnings.

    MindFormers creates ``output/log`` in the working directory when it is imported, unless LOG_MF_PATH says
    otherwise.
    """
    os.environ.setdefault("GLOG_v", "3")
    with tempfile.TemporaryDirectory() as log_folder:
        os.environ.setdefault("LOG_MF_PATH", log_folder)
        logging.disable(logging.WARNING)
        from research.telechat2.telechat_tokenizer import TelechatTokenizer
    logging.disable(logging.NOTSET)
    if os.environ["LOG_MF_PATH"] == log_folder:
        del os.environ["LOG_MF_PATH"]
    return TelechatTokenizer(vocab_file)
