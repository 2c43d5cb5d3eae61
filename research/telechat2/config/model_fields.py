"""TelechatConfig's fields, read from its source: to import it takes ten seconds."""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[1] / "telechat_config.py"
_KINDS = {
    "int": "whole", "float": "real", "bool": "bool", "str": "text", "dict": "section", "list": "list",
    "list[int]": "wholes", "tuple[int, ...]": "wholes", "None": "null",
}  # fmt: skip
_SECTIONS = ("parallel_config", "moe_config")  # made of sections of the YAML


def model_defaults() -> dict:
    """Every field of ``model_config`` and its default."""
    tree = _tree()
    return {name: _default(default, tree) for name, _, default in _fields(tree)}


@cache
def model_kinds() -> dict[str, str]:
    """Every field of ``model_config`` and what its value may be, see kinds.py."""
    return {name: _kind(annotation) for name, annotation, _ in _fields(_tree())}


def _tree() -> ast.Module:
    return ast.parse(_SOURCE.read_text(encoding="utf-8"))


def _fields(tree: ast.Module) -> list[tuple[str, ast.expr, ast.expr]]:
    init = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    arguments = init.args.args[1:]
    return [
        (argument.arg, argument.annotation, default)
        for argument, default in zip(arguments, init.args.defaults, strict=True)
        if argument.arg not in _SECTIONS
    ]


def _kind(annotation: ast.expr | None) -> str:
    if annotation is None:
        return "any"
    names = [name.strip() for name in ast.unparse(annotation).split("|")]
    return "|".join(dict.fromkeys(_KINDS.get(name, "any") for name in names))


def _default(node: ast.expr, tree: ast.Module):
    """A default's value: written there, or a constant that the source imports from a module of rules."""
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    module = next(
        statement.module
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom) and node.id in [name.name for name in statement.names]
    )
    return getattr(import_module(module), node.id)
