"""Stand-ins for CANN's libraries, under which MindSpore compiles graphs for Ascend on any Linux machine.

MindSpore's wheel brings its Ascend plugin, and with MS_SIMULATION_LEVEL=0 MindSpore compiles and executes
nothing. All that is missing without CANN are CANN's shared libraries, and a compilation asks them for nothing
that it uses. So libraries will do in which every symbol is a function that returns 0. Their symbols are

- what the plugin's libraries leave undefined and no library of MindSpore or of the system defines; the tables
  of C++ classes among them are data. They are preloaded, since some of them belong to no library by name;
- what MindSpore looks up by name while it runs: strings in its libraries that look like CANN's names. Which
  library it opens for one is not known, so each of CANN's libraries has them all.

MindSpore takes for CANN's folder the path of a loaded symbol up to the last "cann" in it, and looks for more
libraries in its lib64: hence the layout of the folder, and no library in it has "cann" in its name.

Where CANN is installed nothing is built, and MindSpore compiles against CANN itself.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.plan.dry_run.elf import mentioned, read_library

_RECIPE = 2  # part of the cache's name: to be raised with every change of what is built
_CANN_NAMES = (
    r"acl[a-z]*[A-Z]\w*|[Hh]ccl[A-Z]\w*|rt[A-Z]\w*|dsmi_\w+|drv\w+|[tT]sd\w+|mf_\w+|smem_\w+|ADX\w*|Adump\w*"
    r"|OpApi\w*|(?:Un)?Init[A-Z]\w*|Release\w*|Nnopbase\w*|ge[A-Z]\w+"
)
# What MindSpore opens by name while it runs. The libraries that its plugin is linked to are found in it.
_OPENED_LIBRARIES = (
    "libacl_dvpp.so", "libacl_dvpp_mpi.so", "libacl_dvpp_op.so", "libacl_op_compiler.so",
    "libacl_tdt_channel.so", "libascend_hal.so", "libascendalog.so", "libascendcl.so", "libc_sec.so",
    "libexe_graph.so", "libge_runner.so", "libgraph.so", "libhccl.so", "libmmpa.so", "libmsprofiler.so",
    "libnnopbase.so", "libopapi.so", "libplatform.so", "libprofapi.so", "libregister.so", "libruntime.so",
)  # fmt: skip
# MindSpore's own stand-in for aclrtProcessReport(timeout). One of its threads calls it without end, and as it
# returns at once, that thread takes a processor from the compilation. Preloaded, ours is found before it.
_IDLE = """
int poll(void *, unsigned long, int);
int _ZN9mindspore6device6ascend27SimuFuncIaclrtProcessReportIiEET_i(int timeout)
{
    poll(0, 0, 100);
    return 0;
}
"""
_CLASS_TABLES = ("_ZTV", "_ZTI", "_ZTS")


def ascend_environment(device_num: int, rank: int) -> dict[str, str]:
    """The environment of a process that compiles for rank ``rank`` of ``device_num`` NPUs.

    Adds to this process's environment what MindSpore's simulation needs and, where CANN is not installed, the
    stand-ins, which are built on first use.

    Raises:
        UsageError: no stand-ins can be built here; the message says why.
        OSError: the user's cache directory cannot be written.
    """
    environment = dict(os.environ, MS_SIMULATION_LEVEL="0", RANK_SIZE=str(device_num), RANK_ID=str(rank))
    environment.pop("MS_ROLE", None)  # of a job that this process may belong to, which has its own cluster
    if not cann_is_installed():
        stub = stub_directory()
        lib64, mindspore = stub / "cann" / "lib64", _mindspore_libraries()
        _prepend(environment, "LD_PRELOAD", "liblinked.so")  # a path with a space in it would be two
        _prepend(environment, "LD_LIBRARY_PATH", lib64, mindspore, mindspore / "plugin" / "ascend")
        _prepend(environment, "PYTHONPATH", stub / "python")
    return environment


def cann_is_installed() -> bool:
    """Whether CANN's libraries are on this process's library path, where its ``set_env.sh`` puts them."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return any(Path(folder, "libascendcl.so").exists() for folder in folders if folder)


def stub_directory() -> Path:
    """The folder of the stand-ins for this MindSpore and this processor, built now if it does not exist.

    It lies in the user's cache directory (``XDG_CACHE_HOME``, else ``~/.cache``) and appears there whole or
    not at all; of two processes that build it at once, one is in vain.

    Raises:
        UsageError, OSError: see ascend_environment.
    """
    version, machine = importlib.metadata.version("mindspore"), platform.machine()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "telechat2")
    folder = cache / f"ascend-stub-{_RECIPE}-mindspore-{version}-{machine}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".part.", dir=cache))
    try:
        _build(temporary)
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _build(folder: Path) -> None:
    compiler = _compiler()
    linked, opened, libraries = _missing()
    lib64, package = folder / "cann" / "lib64", folder / "python" / "hccl"
    lib64.mkdir(parents=True)
    _compile(compiler, linked, lib64 / "liblinked.so", _IDLE)
    _compile(compiler, linked | opened, lib64 / "libeverything.so")
    for name in libraries:
        (lib64 / name).symlink_to("libeverything.so")
    # mindspore.communication.init asks CANN's Python package hccl for its version. An empty package te would
    # do harm: MindSpore copes with its absence, not with its emptiness.
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sys_version.py").write_text('__sys_version__ = "0.0.stub"\n')


def _missing() -> tuple[set[str], set[str], set[str]]:
    """Symbols the plugin is linked to, symbols MindSpore looks up by name, names of the missing libraries."""
    lib = _mindspore_libraries()
    plugins = [lib / "plugin" / name for name in ("libmindspore_ascend.so.2", "libmindspore_ops_ascend.so")]
    plugins += (lib / "plugin" / "ascend").rglob("*.so")
    if missing := [path for path in plugins if not path.exists()]:
        raise UsageError(
            f"MindSpore's Ascend plugin is not where it was expected: {missing[0]} does not exist. "
            "Reinstall MindSpore with pip; the wheel for Linux brings the plugin."
        )
    own = [*lib.glob("*.so*"), *plugins]
    read = {path: read_library(path) for path in own}
    defined = {name for library in read.values() for name in library.defined}
    # Python's own modules, which are not called lib…, are loaded by Python.
    needed = {name for path in plugins for name in read[path].needed if name.startswith("lib")}
    needed -= {path.name for path in own}
    system = {name: library for name in needed if (library := _load(name))}
    undefined = {name for path in plugins for name in read[path].undefined} - defined
    here = [ctypes.CDLL(None), *system.values()]
    linked = {
        name
        for name in undefined
        if not name.startswith(("Py", "_Py")) and not any(hasattr(library, name) for library in here)
    }
    # Those in deeper folders are kernels: large, and nothing that looks symbols up.
    readers = [path for path in own if path.parent in (lib, lib / "plugin", lib / "plugin" / "ascend")]
    opened = {name for path in readers for name in mentioned(path, _CANN_NAMES)}
    return linked, opened, (needed - system.keys()) | set(_OPENED_LIBRARIES)


def _load(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return path
    raise UsageError(
        "compiling for Ascend without CANN needs stand-ins for CANN's libraries, which a C compiler builds, "
        "and none of cc, gcc and clang is on PATH. Install one (Debian and Ubuntu: apt install gcc; "
        "openEuler: dnf install gcc), or install CANN and source its set_env.sh."
    )


def _compile(compiler: str, symbols: set[str], library: Path, more: str = "") -> None:
    """One function of which all symbols are names, a zeroed table for each class, and ``more`` code in C."""
    lines = ["static long zero(void) { return 0; }"]
    for name in sorted(symbols):
        if name.startswith(_CLASS_TABLES):
            lines.append(f"void *{name}[32];")
        else:
            lines.append(f'extern long {name}(void) __attribute__((alias("zero")));')
    source = library.with_suffix(".c")
    source.write_text("\n".join(lines) + more)
    options = ["-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w", "-o"]
    command = [compiler, *options, str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(
            f"{compiler} cannot build the stand-ins for CANN's libraries: {done.stderr.strip()[:500]} "
            "Try another C compiler, as the first cc on PATH."
        )
    source.unlink()


def _mindspore_libraries() -> Path:
    spec = importlib.util.find_spec("mindspore")
    if spec is None or spec.origin is None:
        raise UsageError("MindSpore is not installed; install this project with pip.")
    return Path(spec.origin).parent / "lib"


def _prepend(environment: dict[str, str], name: str, *paths: Path | str) -> None:
    before = [environment[name]] if environment.get(name) else []
    environment[name] = os.pathsep.join([*map(str, paths), *before])
