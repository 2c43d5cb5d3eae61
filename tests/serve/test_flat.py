"""Flat model files: imports of the package rewritten, everything else as it was, found by MindFormers."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

from research.telechat2.serve.mindie import flat
from research.telechat2.serve.mindie.settings import CLASSES

SERVED = flat.ROOT / "serve" / "mindie" / "classes.py"


@pytest.fixture(scope="module")
def served() -> dict[str, str]:
    return flat.flat_files(SERVED, CLASSES)


def without_own_imports(source: str) -> str:
    """The syntax tree of a source, its imports from the package or from its folder left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [child for child in body if not is_own(child)] or [ast.Pass()]
    return ast.dump(tree)


def is_own(node) -> bool:
    if not isinstance(node, ast.ImportFrom):
        return False
    return node.level > 0 or (node.module or "").startswith("research")


def imported_files(source: str) -> set[str]:
    """The files of the folder that a source imports, by Python's own rules."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f"{name}.py" for name in names}
    return found


def test_nothing_is_imported_but_libraries_and_files_that_are_there(served):
    assert "telechat.py" in served and "infer_telechat.py" in served
    for name, source in served.items():
        assert imported_files(source) <= served.keys(), name
        for node in ast.walk(ast.parse(source)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(module.split(".")[0] == "research" for module in modules), (name, modules)


def test_only_imports_differ_from_the_packages_own_files(served):
    paths = {flat.flat_name(path): path for path in flat.ROOT.rglob("*.py")}
    for name in served.keys() - {f"{flat.ENTRY}.py"}:
        own = paths[name.removesuffix(".py")].read_text(encoding="utf-8")
        assert without_own_imports(served[name]) == without_own_imports(own), name


def test_mindformers_finds_all_files_in_the_entry_and_none_elsewhere(served, tmp_path):
    """By its own function: it copies what the entry names, and would follow circles for ever."""
    from mindformers.tools.hub.dynamic_module_utils import get_relative_imports

    for name, source in served.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    named = get_relative_imports(tmp_path / f"{flat.ENTRY}.py")
    assert {f"{name}.py" for name in named} | {f"{flat.ENTRY}.py"} == served.keys()
    for name in served.keys() - {f"{flat.ENTRY}.py"}:
        assert get_relative_imports(tmp_path / name) == [], name


# ---------------------------------------------------------------------- a package of a few lines
@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write files of a small package ``research.telechat2``; flatten one of them."""
    root = tmp_path / "research" / "telechat2"
    monkeypatch.setattr(flat, "ROOT", root)

    def make(sources: dict[str, str]) -> dict[str, str]:
        for name, source in sources.items():
            path = root / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source), encoding="utf-8")
        return flat.flat_files(root / "a.py", ["Thing"])

    return make


def body(source: str) -> str:
    assert re.match(r"# Made of research/telechat2/\w+(/\w+)*\.py: change that file", source)
    return source.split("\n", 1)[1]


def test_modules_names_and_both_in_one_statement(package):
    text = """\
        from research.telechat2 import b, c as d
        from research.telechat2.sub import e, helper  # both kinds
        from research.telechat2.sub.e import (
            one,
            two as zwei,
        )
        """
    files = package({"a": text, "b": "", "c": "", "sub/e": "one = two = 1\n", "sub/__init__": "helper = 1\n"})
    assert body(files["a.py"]) == (
        "from . import b as b, c as d\n"
        "from . import sub_e as e\nfrom . sub import helper  # both kinds\n"
        "from . sub_e import one, two as zwei\n"
    )
    assert files.keys() == {"a.py", "b.py", "c.py", "sub_e.py", "sub.py", "telechat_mindie.py"}


def test_imports_in_functions_come_along_and_circles_end(package):
    files = package(
        {
            "a": 'def ask():\n    """é"""; from research.telechat2.b import lazy\n    return lazy()\n',
            "b": "import os\n\n\ndef lazy():\n    from research.telechat2.a import ask\n    return ask\n",
        }
    )
    assert body(files["a.py"]) == 'def ask():\n    """é"""; from . b import lazy\n    return lazy()\n'
    assert body(files["b.py"]) == ("import os\n\n\ndef lazy():\n    from . a import ask\n    return ask\n")


@pytest.mark.parametrize(
    "line, said",
    [
        (
            "import research.telechat2.b",
            "line 2: `import research.telechat2.b` cannot be made flat; write `from",
        ),
        ("from .b import thing", "line 2: `from .b import thing` cannot be made flat"),
        ("from research import telechat2", "line 2: there is no file for"),
        ("from research.telechat2.absent import x", "line 2: there is no file for"),
        ("from research.telechat2.sub.b import x", "would both be sub_b.py"),
    ],
)
def test_what_cannot_be_made_flat_is_named(package, line, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        package(
            {
                "a": f"\n{line}\nfrom research.telechat2 import sub_b\n",
                "b": "",
                "sub_b": "",
                "sub/b": "x = 1\n",
            }
        )


def test_the_entrys_own_name_is_taken(package):
    with pytest.raises(ValueError, match="would both be telechat_mindie.py"):
        package({"a": "from research.telechat2 import telechat_mindie\n", "telechat_mindie": ""})


def test_the_entry_offers_the_classes_and_runs_nothing_else(served):
    entry = served[f"{flat.ENTRY}.py"]
    assert f"from . serve_mindie_classes import {', '.join(CLASSES)}\n" in entry
    assert Path(SERVED).name == "classes.py"
    guarded = entry.split("if TYPE_CHECKING:")[1]
    assert guarded.count("    from .") == len(served) - 1
