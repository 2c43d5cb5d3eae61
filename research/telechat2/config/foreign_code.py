"""Which code a YAML may name: classes of this project, and those below ``--register_path``.

A YAML may come with downloaded weights, so it must not run code. MindFormers executes whatever file
``auto_register`` names, also outside of the folder it is told; and it can be told to trust code that lies
beside a tokenizer or a data set.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from research.telechat2.config.classes import PLACES, PLUGIN
from research.telechat2.config.sections import Settings, sections_at

_PLUGIN_FOLDER = Path(__file__).resolve().parents[1]
_REFERENCE = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".py")


def settle_classes(settings: Settings, register: Path | None) -> list[str]:
    """Refuse foreign code; take out ``auto_register`` where it names a class of this project.

    Those classes are registered when telechat_register.py is imported, so ``type`` alone finds them.

    Args:
        settings: the YAML with overrides, changed in place.
        register: the folder of ``--register_path``, this project's by default; None: nothing is loaded by
            this command, so a module of the user's own need not exist.

    Returns:
        A message for each name that is refused.
    """
    problems = []
    for place, section in _all_sections(settings, ""):
        if "auto_register" in section:
            problem = _check_reference(section, place, register)
            problems += [problem] if problem else []
        if section.get("trust_remote_code"):
            problems.append(
                f"{place}.trust_remote_code is {section['trust_remote_code']!r}, which would run code that "
                "lies beside data or a tokenizer; remove it.".lstrip(".")
            )
    return problems + list(_data_loaders(settings))


def _all_sections(value: object, place: str) -> Iterator[tuple[str, Settings]]:
    """Every dictionary at any depth, and its path."""
    if isinstance(value, dict):
        yield place, value
        for key, inner in list(value.items()):
            yield from _all_sections(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _all_sections(inner, f"{place}[{index}]")


def _check_reference(section: Settings, place: str, register: Path | None) -> str | None:
    """What is wrong with the ``auto_register`` of a section; a class of this project is taken out."""
    reference = section["auto_register"]
    name = f"{place}.auto_register {reference!r}".lstrip(".")
    where = register or _PLUGIN_FOLDER
    found = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    if not found:
        return (
            f"{name} leaves the folder of --register_path, {where}: only file.Class of a file in it is "
            "loaded. Copy the file there, or remove the key for the classes of this project."
        )
    module, cls = found.groups()
    file = where / f"{module}.py"
    is_plugins = where.resolve() == _PLUGIN_FOLDER or not file.is_file()
    if cls in PLUGIN and is_plugins:
        del section["auto_register"]
        return None
    if register is None:
        return None
    if not file.is_file():
        return (
            f"{name}: there is no file {module}.py in {where}. Give --register_path, the folder that holds "
            "it, on the command line; or remove the key for the classes of this project."
        )
    if not file.resolve().is_relative_to(where.resolve()):
        return (
            f"{name} leaves the folder of --register_path: {file} is a link to {file.resolve()}. Copy the "
            "file there."
        )
    return None


def _data_loaders(settings: Settings) -> Iterator[str]:
    """Hugging Face's data loaders read pickles, and run any function of their library."""
    for path in (path for path in PLACES if path.endswith(".data_loader")):
        for place, loader in sections_at(settings, path):
            for at, section in _all_sections(loader, place):
                function = section.get("load_func", "load_dataset")
                if function not in ("load_dataset", "load_from_disk"):
                    yield f"{at}.load_func is {function!r}; it must be load_dataset or load_from_disk."
                for key in ("path", "data_files"):
                    for name in _leaves(section.get(key)):
                        if name == "pandas" or Path(name).suffix.lower() in _PICKLES:
                            yield f"{at}.{key} is {name!r}, which can hold code; give JSON or Parquet."


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
