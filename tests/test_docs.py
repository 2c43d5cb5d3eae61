"""The pages of docs/: every file that they name exists, and the ways pass every package."""

import re
from pathlib import Path

import pytest
from test_layers import LAYERS

CHECKOUT = Path(__file__).resolve().parents[1]
PLUGIN = CHECKOUT / "research" / "telechat2"
PAGES = [*sorted((CHECKOUT / "docs").glob("*.md")), CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "AGENTS.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+(?:\.py|\.sh|\.toml|\.txt|/))`", text)
    missing = [name for name in named if not any((root / name).exists() for root in (PLUGIN, CHECKOUT))]
    assert not missing
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    assert not [target for target in links if not (page.parent / target).exists()]


def test_the_ways_pass_every_package():
    text = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in PLUGIN.glob("*/__init__.py")}
    assert packages <= {name.split("/")[0] for name in re.findall(r"`([\w/]+\.py)`", text)}


def test_the_import_rule_is_drawn_as_it_is_held():
    """Each layer of test_layers.py has a line of the drawing in CONTRIBUTING.md, in the same order."""
    drawing = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```\ncommon")[1]
    lines = [set(line[:50].split()) for line in f"common{drawing}".splitlines()]
    drawn = []
    for layer in LAYERS:
        (number,) = [i for i, words in enumerate(lines) if words >= set(layer)]
        drawn.append(number)
    assert drawn == sorted(drawn)
