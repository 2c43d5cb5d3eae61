"""Conversions that are killed, fail or meet each other: nothing looks finished, and --resume goes on."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import stored_tensors, write_hf_folder
from refusal import refused

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.checkpoint.job import copy, run
from research.telechat2.checkpoint.job import journal as staging

CHECKOUT = Path(__file__).resolve().parents[2]
SIZES = {"n_layer": 2, "hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 512}
OPTIONS = {"max_shard_size": 150_000, "dtype": "float16"}

# Counts every block written or tensor read back, line of the journal, fsync and renaming; at the one of the
# number that it is given it kills its own process, half way through a block. 0 is none: it prints the count.
KILLED_AT = """
import os, signal, sys, threading
from pathlib import Path
from research.telechat2.checkpoint.convert import convert_to_mindspore
from research.telechat2.checkpoint.job import copy as copying, journal as staging, run as job
number, lock = [0], threading.Lock()
copying.BATCH_BYTES = 40_000
def counted(owner, name):
    plain = getattr(owner, name)
    def step(*arguments):
        with lock:
            number[0] += 1
            if number[0] == int(sys.argv[1]):
                if name == "_write":
                    os.pwrite(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)
    setattr(owner, name, step)
counted(copying, "_write"); counted(copying, "checksum_of_range"); counted(staging, "_add_line")
counted(staging, "fsync"); counted(job, "fsync"); counted(Path, "rename"); counted(job, "prove")
convert_to_mindspore("hf", "ms", max_shard_size=150_000, dtype="float16", resume=True)
print(number[0])
"""


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def converted(folder, kill_at):
    """Run it up to that step: the number of steps, None if it was killed."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(kill_at)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == (0 if ended.stdout else -signal.SIGKILL), ended.stderr
    return int(ended.stdout) if ended.stdout else None


def is_whole_or_hidden(folder, expected):
    """What has its name is as it should be, the index comes after its shards, the manifest after all."""
    written = {name: data for name, data in content(folder).items() if ".part/" not in name}
    assert written == {name: expected[name] for name in written}
    if "model.safetensors.index.json" in written:
        assert {name for name in expected if name.endswith(".safetensors")} <= written.keys()
    if "manifest.json" in written:
        assert written.keys() == expected.keys()


def killed_and_resumed(tmp_path, seed, kills):
    """Kill each of some runs, one after the other, at a random step, until that many have been."""
    rng = random.Random(seed)
    write_hf_folder(tmp_path / "hf", SIZES, seed=3, shards=3)
    (tmp_path / "hf" / "prompt_format.json").write_text('{"prompt_format": "chat"}')
    steps = converted(tmp_path, 0)
    expected = content(tmp_path / "ms")
    shutil.rmtree(tmp_path / "ms")
    while kills:
        if converted(tmp_path, rng.randint(1, steps)) is None:
            kills -= 1
            is_whole_or_hidden(tmp_path / "ms", expected)
        else:  # it had fewer steps left
            assert content(tmp_path / "ms") == expected
            shutil.rmtree(tmp_path / "ms")
    if (tmp_path / "ms").exists():
        converted(tmp_path, 0)
        assert content(tmp_path / "ms") == expected


def test_three_random_kills(tmp_path):
    killed_and_resumed(tmp_path, seed=0, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_random_kills(tmp_path, seed):
    killed_and_resumed(tmp_path, seed, kills=20)


@pytest.fixture
def hf(tmp_path):
    write_hf_folder(tmp_path / "hf", SIZES, seed=1, shards=2)
    return tmp_path / "hf"


def stop_after(monkeypatch, writes, error):
    """Writing fails from a number of blocks on."""
    plain, left = copy._write, [writes]

    def write(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return plain(*arguments)

    monkeypatch.setattr(copy, "_write", write)


full = partial(OSError, errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing(hf, tmp_path, monkeypatch):
    stop_after(monkeypatch, 12, full())
    with pytest.raises(OSError, match=r"the disk of .*ms is full \(No space left on device\); free space"):
        convert_to_mindspore(hf, tmp_path / "new" / "ms")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_keeps_what_is_done_for_resume(hf, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 12, full())
        with pytest.raises(OSError, match="is full"):
            convert_to_mindspore(hf, tmp_path / "ms", **OPTIONS, resume=True)
    assert "tensors are kept in" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ms").iterdir()] == [".conversion.part"]
    with refused(tmp_path / "ms", "*.safetensors"):  # nobody takes it for a checkpoint
        convert_to_torch(tmp_path / "ms", tmp_path / "back")

    with refused(".conversion.part", "--resume"):
        convert_to_mindspore(hf, tmp_path / "ms", **OPTIONS)
    with refused("the dtype", "the tensors of each new file"):
        convert_to_mindspore(hf, tmp_path / "ms", resume=True)

    copied, plain = [], copy.copy
    monkeypatch.setattr(copy, "copy", lambda placed, *rest: copied.append(placed) or plain(placed, *rest))
    convert_to_mindspore(hf, tmp_path / "ms", **OPTIONS, resume=True)
    assert 0 < len(copied) < 23  # not those that were done
    convert_to_mindspore(hf, tmp_path / "straight", **OPTIONS)
    assert content(tmp_path / "ms") == content(tmp_path / "straight")


def test_another_source_is_not_resumed(hf, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 12, full())
        with pytest.raises(OSError, match="is full"):
            convert_to_mindspore(hf, tmp_path / "ms", resume=True)
    shutil.rmtree(hf)
    write_hf_folder(hf, SIZES, seed=2, shards=2)
    kept = content(tmp_path / "ms")
    with refused("the files that are read"):
        convert_to_mindspore(hf, tmp_path / "ms", resume=True)
    assert content(tmp_path / "ms") == kept


def test_what_the_disk_lost_is_written_again(hf, tmp_path, monkeypatch):
    """After a power cut the journal may know more than the files: checksums tell."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "prove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert_to_mindspore(hf, tmp_path / "ms", resume=True)
    part = tmp_path / "ms" / ".conversion.part"
    file = part / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5000:] = bytes(5000)
    file.write_bytes(data)
    with open(part / "journal", "ab") as journal:
        journal.write(b'{"file": "model.saf')
    convert_to_mindspore(hf, tmp_path / "ms", resume=True)
    convert_to_mindspore(hf, tmp_path / "straight")
    assert content(tmp_path / "ms") == content(tmp_path / "straight")


lines = st.binary(max_size=40) | st.fixed_dictionaries(
    {},
    optional={
        key: st.text(max_size=3) | st.integers() | st.none() | st.lists(st.none(), max_size=1)
        for key in ("file", "tensor", "checksum", "nan", "inf")
    },
).map(lambda entry: json.dumps(entry).encode())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lost=st.integers(0, 3000), found=st.lists(lines, max_size=3))
def test_a_journal_of_any_content(tmp_path, monkeypatch, lost, found):
    """It is believed as far as it is whole, and that as far as checksums agree."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "ms"
        write_hf_folder(Path(folder) / "hf", SIZES, seed=1)
        with monkeypatch.context() as patch:
            patch.setattr(run, "prove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                convert_to_mindspore(target.parent / "hf", target, resume=True)
        journal = target / ".conversion.part" / "journal"
        journal.write_bytes(journal.read_bytes()[: -lost or None] + b"\n".join(found))
        convert_to_mindspore(target.parent / "hf", target, resume=True)
        convert_to_torch(target, target.parent / "back", verify=False)
        assert stored_tensors(target.parent / "back") == stored_tensors(target.parent / "hf")


def test_two_at_once(hf, tmp_path, monkeypatch):
    """The second of two conversions to one place says so, and disturbs the first in nothing."""
    plain = run.prove

    def meanwhile(*arguments):
        for resume, values in ((True, []), (False, ["--resume"])):
            with refused(".conversion.part", *values):
                convert_to_mindspore(hf, tmp_path / "ms", resume=resume)
        plain(*arguments)

    monkeypatch.setattr(run, "prove", meanwhile)
    convert_to_mindspore(hf, tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "back", verify=False)
    assert stored_tensors(tmp_path / "back") == stored_tensors(hf)


def test_resume_of_nothing_is_a_conversion(hf, tmp_path):
    convert_to_mindspore(hf, tmp_path / "ms", resume=True)
    assert json.loads((tmp_path / "ms" / "manifest.json").read_text())["options"]["verified"] is True
    with refused(tmp_path / "ms", "model.safetensors"):
        convert_to_mindspore(hf, tmp_path / "ms", resume=True)


@pytest.mark.parametrize("where", ["prove", "fsync"])
def test_an_interrupted_ckpt(hf, tmp_path, monkeypatch, where):
    """Before it is proven it is written anew; while files get their names, those that have one keep it."""

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run if where == "prove" else staging, where, fail)
        with pytest.raises(KeyboardInterrupt):
            convert_to_mindspore(hf, tmp_path / "a.ckpt", resume=True)
    assert (tmp_path / "a.ckpt.config.json").exists() == (where == "fsync")  # the first that is named
    assert not (tmp_path / "a.ckpt.manifest.json").exists()
    convert_to_mindspore(hf, tmp_path / "a.ckpt", resume=True)
    assert [path.name for path in tmp_path.glob("*.part")] == []
    assert (tmp_path / "a.ckpt.manifest.json").exists()
    convert_to_torch(tmp_path / "a.ckpt", tmp_path / "back")
    assert stored_tensors(tmp_path / "back") == stored_tensors(hf)


def test_a_source_that_changes_meanwhile(hf, tmp_path, monkeypatch):
    plain = run.prove

    def meanwhile(*arguments):
        plain(*arguments)
        os.utime(hf / "model-00001-of-00002.safetensors")

    monkeypatch.setattr(run, "prove", meanwhile)
    with refused(hf):
        convert_to_mindspore(hf, tmp_path / "ms")
    assert not (tmp_path / "ms").exists()
