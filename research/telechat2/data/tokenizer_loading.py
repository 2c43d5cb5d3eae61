"""Loading the tokenizer in commands that need nothing else of MindFormers."""

from pathlib import Path

from research.telechat2.telechat_cli import quiet_libraries


def load_tokenizer(vocab_file: str | Path):
    """Return a TelechatTokenizer, without the libraries' log folders and notes."""
    quiet_libraries()
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    return TelechatTokenizer(vocab_file)
