"""From a command line to one settings dictionary: find the YAML, read it, apply overrides.

Everything here works on the raw dictionary, before MindFormers' template fills in its defaults. So an
override of ``run_mode`` selects the template, a typo is found before the slow imports, and MindFormers checks
overridden sections exactly as it checks the YAML's own.
"""

import difflib
from pathlib import Path

import yaml

from research.telechat2.common.errors import UsageError
from research.telechat2.config.overrides import load_yaml
from research.telechat2.config.sections import Settings

CHECKOUT = Path(__file__).resolve().parents[3]
SHIPPED = Path("research") / "telechat2"


def shipped_configs(checkout: Path = CHECKOUT) -> list[Path]:
    """Every YAML a user can name: those of the sizes, not the bases they stand on."""
    folder = checkout / SHIPPED
    return sorted(path for path in folder.glob("telechat2-*/*.yaml") if path.parent.name != "telechat2-base")


def resolve_config(name: str, cwd: Path, checkout: Path = CHECKOUT) -> Path:
    """Find the YAML that ``--config name`` means.

    In this order: the path relative to ``cwd``; the path relative to the checkout; a shipped file of that
    name. The README's short spellings (``research/telechat2/finetune_telechat_115b.yaml``,
    ``research/telechat2/infer/predict_telechat2_7b.yaml``, bare names) are resolved in the last step.

    Raises:
        UsageError: no such file, or several shipped files of that name.
    """
    for base in (cwd, checkout):
        if (base / name).is_file():
            return (base / name).resolve()
    shipped = shipped_configs(checkout)
    matches = []
    if _names_a_shipped_file(Path(name)):
        for candidate in _spellings(Path(name)):
            matches = [path for path in shipped if path.name == candidate]
            if matches:
                break
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(str(path.relative_to(checkout)) for path in matches)
        raise UsageError(
            f"--config {name} names {len(matches)} shipped files: {listed}. Give one of these paths."
        )
    raise UsageError(
        f"there is no config {name}, neither below {cwd} nor below {checkout}. {_nearest(name, shipped)}"
    )


def _names_a_shipped_file(path: Path) -> bool:
    """Whether a path that does not exist may stand for a shipped file: a user's own folder never does."""
    folders = [part for part in path.parent.parts if part != "."]
    return not path.is_absolute() and (not folders or folders[0] in ("research", "mindformers", "infer"))


def _spellings(path: Path) -> list[str]:
    """File names a README spelling may stand for, the most literal first.

    ``infer/`` held the front-end parallel configs, which carry the suffix ``_parallel`` today; the MoE size
    has no other kind of prediction.
    """
    name = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
    plain = name.replace("telechat2_", "telechat_")
    parallel = plain.replace(".yaml", "_parallel.yaml")
    if path.parent.name == "infer":
        return [name, parallel, plain]
    return [name, plain, parallel]


def _nearest(name: str, shipped: list[Path]) -> str:
    names = sorted({path.name for path in shipped})
    close = difflib.get_close_matches(Path(name).name, names, n=3, cutoff=0.5)
    if close:
        return f"The nearest shipped names are {', '.join(close)}."
    return f"Shipped are {', '.join(names)}." if names else "This checkout ships no configs."


def resolve_folder(name: str, cwd: Path, checkout: Path = CHECKOUT) -> Path:
    """Find the directory that ``--register_path name`` means: relative to ``cwd``, else to the checkout."""
    for base in (cwd, checkout):
        if (base / name).is_dir():
            return (base / name).resolve()
    raise UsageError(
        f"--register_path {name} is no directory, neither below {cwd} nor below {checkout}; leave it out to "
        f"use {SHIPPED} of this checkout."
    )


def holds_itself(value: object, inside: frozenset[int] = frozenset(), done: set[int] | None = None) -> bool:
    """Whether a section or list is part of itself, as a YAML's aliases allow."""
    done = set() if done is None else done
    if not isinstance(value, (dict, list)) or id(value) in done:
        return False
    inner = value.values() if isinstance(value, dict) else value
    if id(value) in inside or any(holds_itself(item, inside | {id(value)}, done) for item in inner):
        return True
    done.add(id(value))
    return False


def read_config(path: Path, above: tuple[Path, ...] = ()) -> Settings:
    """Read a YAML and the chain of files it names in ``base_config``; the file's own keys win.

    Dictionaries merge at every depth along the chain, lists are replaced whole; of several bases in one list
    a later one replaces the top-level sections of an earlier one. This is MindFormers' own rule. A base is
    relative to its file or, which MindFormers does not know, to research/telechat2 or a folder there.

    ``above``: the files that stand on this one.

    Raises:
        UsageError: not YAML in UTF-8, no mapping, a chain without end, or an alias inside of itself.
        OSError: a file of the chain cannot be read.
    """
    if path.resolve() in above:
        raise UsageError(f"{above[-1]} stands on base_config {path}, which stands on it again; remove one.")
    try:
        own = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 at byte {error.start}; convert it: iconv -f GB18030 -t UTF-8"
        ) from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply to be settings.") from None
    if holds_itself(own):
        raise UsageError(f"{path} has an alias (*) inside of what it stands for (&); remove it.")
    if not isinstance(own, dict):
        raise UsageError(
            f"{path} holds {type(own).__name__}, expected sections such as `model:` and `trainer:`."
        )
    bases = own.pop("base_config", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise UsageError(
            f"{path}: base_config is {bases!r}; it must be the path of a YAML, or a list of such."
        )
    merged: Settings = {}
    for base in bases:
        sizes = (CHECKOUT / SHIPPED).glob("telechat2-*")  # for a copy of a shipped file
        places = (path.parent / base, CHECKOUT / SHIPPED / base, *(size / base for size in sizes))
        base_path = next((place for place in places if place.is_file()), None)
        if base_path is None:
            raise UsageError(f"{path} stands on base_config {base}, but there is no file {places[0]}.")
        merged.update(read_config(base_path, (*above, path.resolve())))
    return _merge(merged, own)


def _merge(base: Settings, own: Settings) -> Settings:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def join_overrides(*groups: dict[str, object]) -> dict[str, object]:
    """The settings of several groups of arguments.

    Raises:
        UsageError: two of them give one setting two values.
    """
    joined: dict[str, object] = {}
    for group in groups:
        for key, value in group.items():
            if key in joined and joined[key] != value:
                raise UsageError(
                    f"{key} is given twice on the command line, as {joined[key]!r} and as {value!r}; give it "
                    "once."
                )
            joined[key] = value
    return joined
