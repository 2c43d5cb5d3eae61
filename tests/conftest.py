"""Fixtures that several test files share."""

from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of released tokenizers and real dialogues that lies beside the checkout."""
    folder = CHECKOUT.parent / "shared" / "data" / "telechat2"
    if not folder.is_dir():
        pytest.skip(f"needs the released tokenizers and dialogues in {folder}, which are not part of the project")
    return folder
