"""The quickstart's own refusals; that it works is tested with the README's commands."""

import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def test_a_folder_that_exists_is_not_written_into(tmp_path):
    (tmp_path / "mine").mkdir()
    command = ["bash", str(CHECKOUT / "scripts" / "quickstart.sh"), "mine"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == (
        "error: mine exists already; name a folder that does not, or none for output/quickstart.\n"
    )
    assert not any((tmp_path / "mine").iterdir())
