"""The layout of the code (CONTRIBUTING.md draws it): who may import whom, and how large a file may be."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "research" / "telechat2"
PACKAGE = "research.telechat2"
# A file imports from its own package and from lines above its own; what is not named here is a command.
LAYERS = (
    ("common",),
    ("config", "text"),
    ("compat", "checkpoint"),
    ("data",),
    ("model", "plan", "telechat_config", "telechat_tokenizer"),
    ("parallel", "generation", "telechat_layer"),
    ("telechat_transformer",),
    ("telechat_interleave",),
    ("telechat",),
    ("infer",),
    ("run", "serve"),
)
LEVEL = {place: level for level, places in enumerate(LAYERS) for place in places}
WITHOUT_MINDSPORE = ("common", "config", "text")
MOST_LINES, MOST_COMMANDS, MOST_LEVELS = 400, 24, 12


def files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def place_of(path: Path) -> str:
    """The package of a file, or the file itself where it lies at the top."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports anywhere in it, also within functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: line {node.lineno} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def file_of(name: str) -> Path | None:
    """The file of this package that a dotted name comes from."""
    base = ROOT.joinpath(*name.removeprefix(PACKAGE).strip(".").split("."))
    places = (base.with_suffix(".py"), base / "__init__.py", base.parent.with_suffix(".py"))
    return next((path for path in (*places, base.parent / "__init__.py") if path.is_file()), None)


def own_imports(path: Path) -> set[Path]:
    names = (name for name in imports(path) if name.startswith(f"{PACKAGE}."))
    return {file for name in names if (file := file_of(name)) not in (None, path, ROOT / "__init__.py")}


def test_a_file_imports_from_its_package_and_from_lower_layers():
    upward = []
    for path in files():
        own = place_of(path)
        places = {place_of(file) for file in own_imports(path)} - {own}
        level = LEVEL.get(own, len(LAYERS))
        upward += [(str(path), place) for place in places if LEVEL.get(place, len(LAYERS)) >= level]
    assert not upward


def test_no_imports_go_in_a_circle():
    order = list(TopologicalSorter({path: own_imports(path) for path in files()}).static_order())
    assert len(order) >= len(files())


def test_the_levels_of_imports_are_few():
    below: dict[str, set[str]] = {}
    for path in files():
        places = {place_of(file) for file in own_imports(path)}
        below.setdefault(place_of(path), set()).update(places - {place_of(path)})

    @cache
    def depth(place: str) -> int:
        return 1 + max(map(depth, below.get(place, ())), default=0)

    assert max(map(depth, below)) <= MOST_LEVELS


@pytest.mark.parametrize("library, allowed", [("mindspore", None), ("mindformers", ("compat",))])
def test_libraries_are_imported_where_they_may_be(library, allowed):
    for path in files():
        uses = any(name.split(".")[0] == library for name in imports(path))
        place = place_of(path)
        if allowed is None:
            assert not (uses and place in WITHOUT_MINDSPORE), path
        else:
            # the self-test runs where only MindIE's folder is seen
            assert not uses or place in allowed or path.name == "self_test.py", path


def test_files_are_small_and_the_top_folder_is_short():
    long = {path.name: n for path in files() if (n := len(path.read_text().splitlines())) > MOST_LINES}
    assert not long
    assert len(list(ROOT.glob("*.py"))) <= MOST_COMMANDS


def test_a_users_mistake_is_raised_as_one():
    """A plain ValueError is printed with its traceback, as a defect. Two files import nothing of ours."""
    plain = [
        (str(path), node.lineno)
        for path in files()
        if path.name not in ("environment.py", "self_test.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and "ValueError" in ast.unparse(node)
    ]
    assert not plain
