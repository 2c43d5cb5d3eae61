"""The same bytes however many work on it, and however often a run is killed and continued."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_lines import chat, plain_lines, write_lines
from refusal import refused

from research.telechat2.data import engines, preparing, sources, spool, writing
from research.telechat2.data.job import Options
from research.telechat2.data.preparing import prepare

CHECKOUT = Path(__file__).resolve().parents[2]
OPTIONS = Options(max_length=63, seed=7, records_per_file=40, bad_lines="skip")


@pytest.fixture
def small_parts(monkeypatch):
    """Batches, segments and buckets so small that a few lines fill several."""
    monkeypatch.setattr(sources, "BATCH_BYTES", 1500)
    monkeypatch.setattr(spool, "SEGMENT_BATCHES", 3)
    monkeypatch.setattr(spool, "BUCKET_TOKENS", 2000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Conversations, texts, and lines that are skipped for all kinds of reasons; a file with a weight."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(3)
    words = ["the fox", "狗", "jumps", "生抽", "over", "2+2", "\n", "🦊", "<_end>"]

    def text(n):
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, n)))

    lines = [chat(*(text(6) for _ in range(2 * rng.randint(1, 3)))) for _ in range(150)]
    lines += [{"text": text(60)} for _ in range(20)]
    lines += ["", "{", {"input": text(3), "output": ""}, {"input": r"\ud83d", "output": "\ud83d"}]
    lines += [chat("q", text(100)) for _ in range(5)]
    rng.shuffle(lines)
    write_lines(folder / "a.jsonl", lines)
    write_lines(folder / "b.jsonl", [chat(text(5), text(5)) for _ in range(60)])
    (folder / "mixture.json").write_text('{"a.jsonl": 1, "b.jsonl": 1.5}')
    return folder / "mixture.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(corpus, small_vocab, tmp_path_factory) -> dict[str, bytes]:
    """What one worker makes without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        small_parts.__wrapped__(patch)
        folder = tmp_path_factory.mktemp("expected") / "out"
        result = prepare(str(corpus), small_vocab, folder, OPTIONS, workers=1, report="en")
    counts = result["counts"]
    assert counts["lines"] == 239 and len(result["files"]) >= 3
    assert counts["lines"] == counts["conversations"] + counts["texts"] + sum(counts["skipped"].values())
    assert len(counts["skipped"]) >= 4 and counts["copies_by_weight"] > 10
    return contents(folder)


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(
    small_parts, corpus, small_vocab, expected, tmp_path, workers
):
    prepare(str(corpus), small_vocab, tmp_path / "out", OPTIONS, workers=workers, report="en")
    assert contents(tmp_path / "out") == expected


def test_another_seed_gives_other_bytes(small_parts, corpus, small_vocab, expected, tmp_path):
    prepare(str(corpus), small_vocab, tmp_path / "out", OPTIONS._replace(seed=8), workers=1)
    assert (tmp_path / "out" / "dataset-00000.mindrecord").read_bytes() != expected[
        "dataset-00000.mindrecord"
    ]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_killed_before_any_write_and_continued_the_bytes_are_the_same(
    small_parts, corpus, small_vocab, expected, tmp_path, monkeypatch
):
    """One run, killed again and again, each time one step on the way to the disk later than before."""
    steps = [0]
    allowed = [0]

    def counted(function):
        def step(*arguments, **more):
            steps[0] += 1
            if steps[0] > allowed[0]:
                raise Killed
            return function(*arguments, **more)

        return step

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "rename", counted(os.rename))
    monkeypatch.setattr(writing, "index_of", counted(writing.index_of))  # before, within and after a file
    kills = 0
    while True:
        steps[0] = 0
        allowed[0] = kills % 7 + kills // 7  # sometimes it gets on, sometimes it is killed at once
        try:
            prepare(str(corpus), small_vocab, tmp_path / "out", OPTIONS, workers=1, report="en", resume=True)
            break
        except Killed:
            kills += 1
            assert not (tmp_path / "out" / "dataset.mindrecord.json").exists()
            assert kills < 100
    assert kills > 10
    assert contents(tmp_path / "out") == expected


RUN = """
import sys
from pathlib import Path
from research.telechat2.data import preparing, sources, spool
from research.telechat2.data.job import Options
if __name__ == "__main__":
    sources.BATCH_BYTES, spool.SEGMENT_BATCHES, spool.BUCKET_TOKENS = 1500, 3, 2000
    options = Options(max_length=63, seed=7, records_per_file=40, bad_lines="skip")
    corpus, vocab, out = sys.argv[1:]
    preparing.prepare(corpus, vocab, out, options, workers=2, report="en", resume=True)
"""


def test_processes_killed_at_a_random_moment_leave_nothing_running(corpus, small_vocab, expected, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), str(corpus), str(small_vocab), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "GLOG_v": "3"}
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 60
        while not list((tmp_path / "out").rglob("segment-*.json")):
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.01)
        time.sleep(random.random())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(alive(child) for child in children):
            assert time.monotonic() < give_up
            time.sleep(0.02)
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=120)
    assert contents(tmp_path / "out") == expected


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


@pytest.fixture
def stopped(small_parts, corpus, small_vocab, tmp_path, monkeypatch) -> Path:
    """The output folder of a run that was killed while it wrote."""

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(preparing, "_part", killed)
        prepare(str(corpus), small_vocab, tmp_path / "out", OPTIONS, workers=1)
    return tmp_path / "out"


def test_a_run_that_was_stopped_is_noticed_and_not_mixed_with_another(stopped, corpus, small_vocab):
    with refused(".dataset.mindrecord.partial", "--resume"):
        prepare(str(corpus), small_vocab, stopped, OPTIONS)
    with refused("another options"):
        prepare(str(corpus), small_vocab, stopped, OPTIONS._replace(seed=8), resume=True)
    with refused("another inputs"):
        prepare(str(corpus.parent / "a.jsonl"), small_vocab, stopped, OPTIONS, resume=True)
    folder = writing.partial_folder(stopped / "dataset.mindrecord")
    with (
        writing.locked(folder),
        refused(folder),
    ):
        prepare(str(corpus), small_vocab, stopped, OPTIONS, resume=True)
    assert list(folder.glob("segment-*.json")), "what was done is still there"


def test_an_engine_that_cannot_be_used_deletes_nothing(stopped, corpus, small_vocab, expected, monkeypatch):
    with refused("'spark'", "processes or ray"):
        prepare(str(corpus), small_vocab, stopped, OPTIONS, engine="spark", resume=True)
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with refused("--engine ray", ".[ray]"):
        prepare(str(corpus), small_vocab, stopped, OPTIONS, engine="ray", resume=True)
    prepare(str(corpus), small_vocab, stopped, OPTIONS, resume=True, report="en")
    assert contents(stopped) == expected


def test_a_disk_that_fails_is_a_sentence_and_the_run_can_go_on(
    small_parts, corpus, small_vocab, expected, tmp_path, monkeypatch
):
    from mindspore.mindrecord import FileWriter

    def full(*_):
        raise RuntimeError("no space left")

    with (
        monkeypatch.context() as patch,
        refused("dataset.mindrecord", "no space left", "--resume", kind=OSError),
    ):
        patch.setattr(FileWriter, "commit", full)
        prepare(str(corpus), small_vocab, tmp_path / "out", OPTIONS)
    prepare(str(corpus), small_vocab, tmp_path / "out", OPTIONS, resume=True, report="en")
    assert contents(tmp_path / "out") == expected


def test_ctrl_c_says_how_to_go_on(small_parts, corpus, small_vocab, expected, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "_part", interrupted)
        prepare(str(corpus), small_vocab, tmp_path / "out", OPTIONS)
    assert capsys.readouterr().err.endswith("stopped; the same command with --resume continues\n")
    prepare(str(corpus), small_vocab, tmp_path / "out", OPTIONS, resume=True, report="en")
    assert contents(tmp_path / "out") == expected


def test_a_worker_that_dies_is_a_sentence_and_the_run_can_go_on(small_parts, corpus, small_vocab, tmp_path):
    command = [
        sys.executable, "-c", RUN.replace("preparing.prepare(", "from dying import _work\n    from "
        "research.telechat2.data import engines\n    engines._work = _work\n    preparing.prepare("),
        str(corpus), str(small_vocab), str(tmp_path / "out"),
    ]  # fmt: skip
    (tmp_path / "dying.py").write_text("import os\n\ndef _work(batch):\n    os._exit(9)\n")
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "OSError: a worker process died" in done.stderr and "continue with --resume" in done.stderr
    assert (tmp_path / "out" / ".dataset.mindrecord.partial" / "job.json").is_file()


@pytest.mark.slow  # starts a Ray cluster: half a minute
def test_a_ray_cluster_of_two_workers_gives_the_same_bytes(corpus, small_vocab, expected, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    script = tmp_path / "run.py"
    script.write_text(RUN.replace("workers=2", "engine='ray', workers=2"))
    command = [sys.executable, str(script), str(corpus), str(small_vocab), str(tmp_path / "out")]
    search = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "GLOG_v": "3"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected


def test_an_interrupt_while_mindspore_is_imported_ends_without_a_crash(small_vocab, tmp_path):
    """It is imported when the first records are written; the run goes on with --resume."""
    write_lines(tmp_path / "d.jsonl", plain_lines(3))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [
        sys.executable,
        str(CHECKOUT / "research/telechat2/telechat_preprocess.py"),
        "--input_dataset_file",
        "d.jsonl",
        "--max_length",
        "60",
    ]
    command += ["--vocab_file_path", str(small_vocab), "--output_path", "out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"TMPDIR": str(scratch)}, text=True, stderr=subprocess.PIPE
    )
    while "/mindspore/" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said and "--resume" in said
    assert not list(scratch.iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".dataset.mindrecord.partial"]
