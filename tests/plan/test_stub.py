"""The stand-ins for CANN: built once per user, whole or not at all, and only where CANN is missing."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from refusal import refused

from research.telechat2.plan.dry_run import cann_stub
from research.telechat2.plan.dry_run.elf import mentioned, read_library


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    return tmp_path / "a cache"


def test_two_processes_that_build_at_once_end_with_one_whole_folder(no_cache):
    code = "from research.telechat2.plan.dry_run.cann_stub import stub_directory; print(stub_directory())"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))

    def build(_):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(build, range(2)))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    folder = cann_stub.stub_directory()
    assert {d.stdout.strip() for d in done} == {str(folder)}
    assert list(folder.parent.iterdir()) == [folder]
    everything = ctypes.CDLL(str(folder / "cann" / "lib64" / "libascendcl.so"))
    assert everything.aclInit(None) == 0


def test_without_a_compiler_the_error_names_what_to_install(no_cache, monkeypatch):
    monkeypatch.setenv("PATH", str(no_cache))
    with refused("cc", "gcc", "clang", "apt install gcc", "dnf install gcc"):
        cann_stub.ascend_environment(8, 0)
    assert not any((no_cache / "telechat2").iterdir())


def test_where_cann_is_installed_nothing_stands_in_for_it(no_cache, tmp_path, monkeypatch):
    (tmp_path / "libascendcl.so").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    environment = cann_stub.ascend_environment(16, 3)
    added = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    assert added == {"MS_SIMULATION_LEVEL": "0", "RANK_SIZE": "16", "RANK_ID": "3"}
    assert not no_cache.exists()


def test_the_elf_reader_sees_what_the_compiler_was_told(tmp_path):
    source = tmp_path / "x.c"
    source.write_text(
        "extern int wanted(void); extern int maybe(void) __attribute__((weak));\n"
        'const char *name(void) { return "aclrtSomething"; }\n'
        "int data = 5;\n"
        "int user(void) { return wanted() + (maybe ? maybe() : 0); }\n"
    )
    path = tmp_path / "libx.so"
    subprocess.run(
        [cann_stub._compiler(), "-shared", "-fPIC", "-o", path, source, "-Wl,--no-as-needed", "-lm"],
        check=True,
    )
    library = read_library(path)
    assert {"name", "data", "user"} <= library.defined
    assert "wanted" in library.undefined and "maybe" not in library.undefined
    assert "libm.so.6" in library.needed
    assert mentioned(path, r"acl\w+") == {"aclrtSomething"}


def test_a_file_that_is_no_library_is_named(tmp_path):
    path = tmp_path / "x.so"
    path.write_text("INPUT(libx.so.6)")
    with refused(path, "ELF"):
        read_library(path)
