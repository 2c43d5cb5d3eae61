"""The code in a folder for MindIE: the files of this package that serving needs, copied as they are."""

import ast
import filecmp
import shutil
from pathlib import Path

from research.telechat2.common.errors import UsageError

_IMPORT_ROOT = Path(__file__).resolve().parents[4]
_PACKAGE = Path("research", "telechat2")
_HERE = Path(__file__).parent


def copy_code(folder: Path) -> None:
    """Put ``telechat_mindie.py``, which MindFormers loads, and the package in ``research/`` into a folder."""
    shutil.copyfile(_HERE / "telechat_mindie.py", folder / "telechat_mindie.py")
    for file in needed_files(_HERE / "classes.py"):
        target = folder / file.relative_to(_IMPORT_ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    # a regular package, or that of a MindFormers checkout would hide it wherever it is on the import path
    (folder / "research" / "__init__.py").write_text('"""The code that this folder is served by."""\n')


def needed_files(module: Path) -> set[Path]:
    """``module`` and all files of this package that it imports, directly or not, also within functions."""
    found: set[Path] = set()
    to_read = [module]
    while to_read:
        path = to_read.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        to_read += [folder / "__init__.py" for folder in path.parents if folder.is_relative_to(_IMPORT_ROOT)]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            for name in names:
                if name.startswith(".".join(_PACKAGE.parts)):
                    base = _IMPORT_ROOT.joinpath(*name.split("."))
                    to_read += [base.with_suffix(".py"), base / "__init__.py"]
    return found


def check_code(folder: Path) -> None:
    """Refuse a folder that holds other code than this process runs: it imports one version.

    MindFormers asks for the classes of a folder only where it knows none of their names yet.
    """
    for file in (folder / _PACKAGE).rglob("*.py"):
        running = _IMPORT_ROOT / file.relative_to(folder)
        if not running.is_file() or not filecmp.cmp(file, running, shallow=False):
            raise UsageError(
                f"{folder}: {file.relative_to(folder)} is not as in {_IMPORT_ROOT / _PACKAGE}, which this "
                "process runs; serve each version in its own process, or build both folders by the same one."
            )
