"""Python files of this package as flat ones that import each other and nothing else of it.

MindFormers loads a model from a folder by copying the file that a YAML names, and the files that its lines
``from .name import`` name, into a package of its own. It looks for such lines with a regular expression,
copies only what the first file names, and never ends where imports go in a circle. So one entry file names
all the others in lines that are never run, and the others write ``from . name import``, which is the same to
Python and nothing to that expression.
"""

import ast
from pathlib import Path

from research.telechat2.common.errors import UsageError

PACKAGE = "research.telechat2"

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "telechat_mindie"
_ENTRY_TEXT = '''"""The file that MindFormers loads: settings, tokenizer and model as MindIE meets them."""

from typing import TYPE_CHECKING

from . {module} import {classes}

if TYPE_CHECKING:  # never run: MindFormers copies the files that such lines name, and no others
{lines}

__all__ = [{names}]
'''


def flat_files(module: Path, classes: list[str]) -> dict[str, str]:
    """The sources of ``module`` and all that it imports of this package, by flat file names.

    Args:
        module: a file of this package.
        classes: what the entry file ``telechat_mindie.py`` is to offer of it.

    Raises:
        UsageError: a file imports in a way that cannot be made flat, or two have one flat name.
    """
    sources, names = {}, {}
    for path in _closure(module):
        name = flat_name(path)
        if name in names or name == ENTRY:
            raise UsageError(
                f"{path} and {names.get(name, 'the entry file')} would both be {name}.py in one folder; "
                f"rename one of them."
            )
        names[name] = path
        sources[f"{name}.py"] = _rewritten(path)
    lines = "\n".join(f"    from .{name} import __name__" for name in sorted(names))
    sources[f"{ENTRY}.py"] = _ENTRY_TEXT.format(
        module=flat_name(module), classes=", ".join(classes), lines=lines,
        names=", ".join(f'"{name}"' for name in classes),
    )  # fmt: skip
    return sources


def flat_name(path: Path) -> str:
    """``checkpoint/sizes.py`` is ``checkpoint_sizes``, and ``checkpoint/__init__.py`` is ``checkpoint``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "_".join(part for part in parts if part != "__init__")


def _closure(module: Path) -> list[Path]:
    """``module`` and every file of this package that it needs, imports within functions included."""
    found, to_read = {}, [module]
    while to_read:
        path = to_read.pop()
        if path not in found:
            found[path] = None
            to_read += [target for node in _own_imports(path) for target, _ in _targets(node, path)]
    return sorted(found)


def _own_imports(path: Path) -> list[ast.ImportFrom]:
    """The statements that import from this package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if _is_own(names[0]) and not node.level:
                found.append(node)
                continue
        else:
            continue
        if getattr(node, "level", 0) or any(map(_is_own, names)):
            raise UsageError(
                f"{path}, line {node.lineno}: `{ast.unparse(node)}` cannot be made flat; write "
                f"`from {PACKAGE}.… import …`."
            )
    return found


def _is_own(module: str) -> bool:
    return module.split(".")[0] == PACKAGE.split(".")[0]


def _targets(node: ast.ImportFrom, path: Path) -> list[tuple[Path, ast.alias | None]]:
    """The file of each name that a statement imports, and the name where it is none of a file."""
    base = ROOT.joinpath(*node.module.split(".")[len(PACKAGE.split(".")) :])
    targets = []
    for alias in node.names:
        if (base / f"{alias.name}.py").is_file():
            targets.append((base / f"{alias.name}.py", None))
            continue
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not file.is_file() or file == ROOT / "__init__.py":
            raise UsageError(f"{path}, line {node.lineno}: there is no file for `{ast.unparse(node)}`.")
        targets.append((file, alias))
    return targets


def _rewritten(path: Path) -> str:
    """The source of a file with its imports from this package made flat, and everything else as it is."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    for node in sorted(_own_imports(path), key=lambda node: -node.lineno):
        first, last = node.lineno - 1, node.end_lineno - 1
        before = lines[first].encode()[: node.col_offset].decode()
        after = lines[last].encode()[node.end_col_offset :].decode()
        statements = f"\n{before}".join(_flat_imports(node, path))
        lines[first : last + 1] = [f"{before}{statements}{after}"]
    source = f"# Made of {path.relative_to(ROOT.parents[1])}: change that file, and build this folder anew.\n"
    source += "".join(lines)
    assert not any(_is_own(name) for name in _imported(source)), path
    return source


def _flat_imports(node: ast.ImportFrom, path: Path) -> list[str]:
    """The statements that stand for one, one for each file that it imports from."""
    names: dict[str, list[str]] = {}
    for alias, (target, own) in zip(node.names, _targets(node, path), strict=True):
        name = flat_name(target)
        if own is None:
            names.setdefault(".", []).append(f"{name} as {alias.asname or alias.name}")
        else:
            names.setdefault(f". {name}", []).append(ast.unparse(alias))
    return [f"from {module} import {', '.join(imported)}" for module, imported in names.items()]


def _imported(source: str) -> list[str]:
    nodes = list(ast.walk(ast.parse(source)))
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return found + [
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
