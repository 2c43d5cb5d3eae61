"""Two trainings never share an output folder."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from refusal import refused

from research.telechat2.run.lock import only_training_in

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_second_is_refused_and_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "out"
    with only_training_in(folder):
        (folder / "result").touch()
        with refused(folder, f"process {os.getpid()}", "--output_dir"):
            only_training_in(folder).__enter__()
        with only_training_in(tmp_path / "other"):
            pass
    assert [path.name for path in folder.iterdir()] == ["result"]
    assert not (tmp_path / "other").exists()  # nothing was written there
    with only_training_in(folder):
        pass


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path):
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from research.telechat2.run.lock import only_training_in
        with only_training_in(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with refused(f"process {process.pid} on"):
        only_training_in(tmp_path).__enter__()
    process.kill()
    process.wait()
    with only_training_in(tmp_path):
        pass
    assert not any(tmp_path.iterdir())
