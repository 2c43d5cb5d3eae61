"""Whether Python, MindSpore and MindFormers are those that the plugin is made for, before it imports them.

Every command runs this file first, by its path: with another `research` package on the path an import of ours
would find that one. It is written for any Python 3, and looks at names and versions alone, which takes
milliseconds.
"""

import importlib.machinery
import importlib.util
import os
import re
import shlex
import signal
import sys
from pathlib import Path

PYTHON = (3, 11)
VERSIONS = {"mindspore": "2.9.0", "mindformers": "1.9.0"}  # of pyproject.toml
# What commands import at their beginning, by the name of pip.
PACKAGES = {
    "numpy": "numpy",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "xxhash": "xxhash",
    "tqdm": "tqdm",
    "sentencepiece": "sentencepiece",
}
# These start without MindSpore and MindFormers; some of their options ask for them later.
WITHOUT = (
    "convert_weight.py",
    "convert_reversed.py",
    "transform_ckpt.py",
    "telechat_plan.py",
    "train_tokenizer.py",
)
ANY_VERSION = "TELECHAT_ANY_VERSION"
CHECKOUT = Path(__file__).resolve().parents[3]


def check_environment(command: str) -> "list[str]":
    """Check what the command in a file of that name needs; returns what is unusual and may work.

    Raises:
        ValueError: Python is too old, a package is missing, or another one of its name comes first.
    """
    if sys.version_info < PYTHON:
        found, needed = (".".join(map(str, version[:2])) for version in (sys.version_info, PYTHON))
        raise ValueError(f"this is Python {found} ({sys.executable}), the plugin needs {needed}; {remedy()}.")
    _check_research()
    required = list(PACKAGES) + ([] if command in WITHOUT else list(VERSIONS))
    folders = {name: _found(name) for name in required}
    absent = [name for name, folder in folders.items() if folder is None]
    if absent:
        names = ", ".join(PACKAGES.get(name, name) for name in absent)
        raise ValueError(f"{names}: not installed in this Python ({sys.executable}); {remedy()}.")
    return [
        note
        for name, folder in folders.items()
        if name in VERSIONS and folder
        for note in _notes(name, folder)
    ]


def remedy() -> str:
    """What to type where packages are missing."""
    ready = CHECKOUT / ".venv" / "bin" / "activate"
    if ready.is_file() and Path(sys.prefix).resolve() != ready.parents[1].resolve():
        return f"activate the environment of this checkout: source {shlex.quote(str(ready))}"
    return (
        "activate the environment that has them, or make one: python3.11 -m venv .venv && source "
        f".venv/bin/activate && pip install -e {shlex.quote(str(CHECKOUT))} (bash scripts/quickstart.sh does "
        "so, too)"
    )


def _found(name: str) -> "Path | None":
    """Where Python would import a package from, as a folder; None: nowhere."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:  # a folder without __init__.py is no package
        return None
    return Path(spec.origin).resolve().parent


def _check_research() -> None:
    """A MindFormers checkout has a package `research`, which would hide ours."""
    spec = importlib.machinery.PathFinder.find_spec("research")
    folder = CHECKOUT / "research"
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent == folder:
        return
    other = Path(spec.origin).parents[1]
    raise ValueError(
        f"the package `research` of {other} (a MindFormers checkout?) hides that of {CHECKOUT}; "
        f"{_off_the_path(other)}."
    )


def _off_the_path(folder: Path) -> str:
    if os.environ.get("PYTHONPATH"):
        return "unset PYTHONPATH (now {})".format(os.environ["PYTHONPATH"])
    return f"run the command from a directory other than {folder}"


def _notes(name: str, folder: Path) -> "list[str]":
    """What is unusual of MindSpore or MindFormers.

    Raises:
        ValueError: another one hides the installed one, or it is older than the plugin knows.
    """
    from importlib import metadata

    expected, installed, version = VERSIONS[name], None, None
    try:
        distribution = metadata.distribution(name)
        installed = Path(str(distribution.locate_file(name))).resolve()
        version = distribution.version
    except metadata.PackageNotFoundError:
        pass
    hides = installed is not None and installed.is_dir() and installed != folder
    if version is None or hides:
        version = _version_in(folder) or "of unknown version"
    allowed = bool(os.environ.get(ANY_VERSION))
    if hides and version != expected and not allowed:
        raise ValueError(
            f"{name} would come from {folder} ({version}), which hides the installed one in {installed}; "
            f"{_off_the_path(folder.parent)}, or set {ANY_VERSION}=1 to use it."
        )
    where = f", from {folder}" if hides else ""
    if _number(version) < _number(expected) and not allowed:
        raise ValueError(
            f"{name} is {version}{where}, but the plugin is made for {name} {expected}; {remedy()}. "
            f"{ANY_VERSION}=1 tries it all the same."
        )
    if version != expected:
        return [f"{name} is {version}{where}; the plugin is tested with {expected}"]
    return [f"{name} is taken from {folder}"] if hides else []


def _version_in(folder: Path) -> "str | None":
    """The ``__version__`` that a package's source states."""
    for file in (folder / "version.py", folder / "__init__.py"):
        if file.is_file():
            found = re.search(
                r"""^__version__ *= *['"]([^'"]+)""", file.read_text(errors="replace"), re.MULTILINE
            )
            if found:
                return found.group(1)
    return None


def _number(version: str) -> "tuple[int, ...]":
    """A version as numbers to compare; without any, it counts as new."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else (9999,)


def main(command: str) -> None:
    """Check, and end the process where a command cannot work; notes are printed to stderr."""
    _listen()
    try:
        notes = check_environment(command)
    except ValueError as error:
        sys.exit(_told(f"error: {error}"))
    for note in notes:
        sys.stderr.write(f"note: {note}\n")


def _listen() -> None:
    """Until the command has its handlers Ctrl-C ends it with status 130, without an import's traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: object) -> None:
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(130)


def _told(sentence: str) -> "str | int":
    """What the process ends with; a worker of msrun leaves the sentence for its launcher."""
    folder = os.environ.get("TELECHAT_ERRORS")
    if not folder or os.environ.get("MS_ROLE") != "MS_WORKER":
        return sentence
    with open(os.path.join(folder, "rank_" + os.environ.get("RANK_ID", "0")), "w", encoding="utf-8") as file:
        file.write(sentence + "\n")
    return 1
