"""From a command line to one settings dictionary: find the YAML, read it, apply overrides.

Everything here works on the raw dictionary, before MindFormers' template fills in its defaults. So an
override of ``run_mode`` selects the template, a typo is found before the slow imports, and MindFormers checks
overridden sections exactly as it checks the YAML's own.
"""

import argparse
import difflib
import json
import re
from pathlib import Path

import yaml

from research.telechat2.config.places import is_setting, settings_like

CHECKOUT = Path(__file__).resolve().parents[2]
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
        ValueError: no such file, or several shipped files of that name.
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
        raise ValueError(
            f"--config {name} names {len(matches)} shipped files: {listed}. Give one of these paths."
        )
    raise ValueError(
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
    raise ValueError(
        f"--register_path {name} is no directory, neither below {cwd} nor below {checkout}; "
        f"leave it out to use {SHIPPED} of this checkout."
    )


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which makes no Python objects; with numbers of YAML 1.2, and no key twice.

    YAML 1.1 reads ``1e-5`` as text, and of a key that stands twice the last wins without a word.
    """

    def construct_mapping(self, node, deep=False):
        seen: dict = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    "in a section", node.start_mark, f"the key {name} stands twice, first in line "
                    f"{seen[name]}; remove one", key.start_mark,
                )  # fmt: skip
            seen[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> object:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is none, or a section has a key twice.
    """
    return yaml.load(text, _Loader)


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


def read_config(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """Read a YAML and the chain of files it names in ``base_config``; the file's own keys win.

    Dictionaries merge at every depth along the chain, lists are replaced whole; of several bases in one list
    a later one replaces the top-level sections of an earlier one. This is MindFormers' own rule. A base is
    relative to its file or, which MindFormers does not know, to research/telechat2.

    ``above``: the files that stand on this one.

    Raises:
        ValueError: not YAML in UTF-8, no mapping, a chain without end, or an alias inside of itself.
        OSError: a file of the chain cannot be read.
    """
    if path.resolve() in above:
        raise ValueError(f"{above[-1]} stands on base_config {path}, which stands on it again; remove one.")
    try:
        own = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}; convert it: iconv -f GB18030 -t UTF-8"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be settings.") from None
    if holds_itself(own):
        raise ValueError(f"{path} has an alias (*) inside of what it stands for (&); remove it.")
    if not isinstance(own, dict):
        raise ValueError(
            f"{path} holds {type(own).__name__}, expected sections such as `model:` and `trainer:`."
        )
    bases = own.pop("base_config", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise ValueError(
            f"{path}: base_config is {bases!r}; it must be the path of a YAML, or a list of such."
        )
    merged: dict = {}
    for base in bases:
        places = (path.parent / base, CHECKOUT / SHIPPED / base)
        base_path = next((place for place in places if place.is_file()), None)
        if base_path is None:
            raise ValueError(f"{path} stands on base_config {base}, but there is no file {places[0]}.")
        merged.update(read_config(base_path, (*above, path.resolve())))
    return _merge(merged, own)


def _merge(base: dict, own: dict) -> dict:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def boolean(text: str) -> bool:
    """Read True or False, in any case: an argparse type."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


def boolean_or_text(text: str) -> bool | str:
    """Read True or False, or anything else as text: an argparse type."""
    return boolean(text) if text.lower() in ("true", "false") else text


def parse_value(text: str) -> object:
    """The value a word on the command line stands for, as YAML reads it: True, 3, 1e-4, [1, 2], null, text.

    Unlike YAML 1.1, ``1e-4`` is a number, and ``12:30``, ``010`` and dates stay text.
    """
    if re.fullmatch(r"[-+]?(0|[1-9]\d*)", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", text) and not re.fullmatch(
        r"[-+]?0\d+", text
    ):
        return float(text)
    if text in ("null", "~", ""):
        return None if text else ""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text[0] in "[{\"'":
        try:
            return load_yaml(text)
        except yaml.YAMLError:
            return text
    return text


def value_word(value: object) -> str:
    """``value`` as a word that ``parse_value`` reads back as the same."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    return text if parse_value(text) == value else json.dumps(text, ensure_ascii=False)


def parse_overrides(words: list[str]) -> dict[str, object]:
    """Read ``--a.b.c value`` and ``--a.b.c=value`` pairs into ``{"a.b.c": value}``.

    Raises:
        ValueError: a value without a key, or a key without a value.
    """
    overrides: dict[str, object] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"unexpected argument {word!r}: a setting is given as --section.key value.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} is given without a value; expected --{key} VALUE.")
            text = rest.pop(0)
        overrides[key] = parse_value(text)
    return overrides


def parse_options(words: list[str]) -> dict[str, object]:
    """Read the ``key=value`` words of ``--options``; ``a,b`` is a list.

    Raises:
        ValueError: a word without ``=``.
    """
    options: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"--options {word}: expected key=value.")
        options[key] = (
            [parse_value(part) for part in text.split(",")] if _is_bare_list(text) else parse_value(text)
        )
    return options


def join_overrides(*groups: dict[str, object]) -> dict[str, object]:
    """The settings of several groups of arguments.

    Raises:
        ValueError: two of them give one setting two values.
    """
    joined: dict[str, object] = {}
    for group in groups:
        for key, value in group.items():
            if key in joined and joined[key] != value:
                raise ValueError(
                    f"{key} is given twice on the command line, as {joined[key]!r} and as {value!r}; give it "
                    "once."
                )
            joined[key] = value
    return joined


def _is_bare_list(text: str) -> bool:
    return "," in text and text[0] not in "[{\"'"


def apply_overrides(config: dict, overrides: dict[str, object], template: dict[str, dict]) -> None:
    """Set every ``a.b.c`` of ``overrides`` in ``config``, in place.

    A key that is new in a section is set, as MindFormers does; a section that is nowhere, or a new top-level
    key, is a typo.

    Args:
        config: the raw settings.
        overrides: dotted key to value.
        template: MindFormers' own sections with their default keys, ``""`` holding the top-level keys; also
            sections inside, by their dotted names.

    Raises:
        ValueError: a section or top-level key that neither the config nor MindFormers knows.
    """
    for key, value in overrides.items():
        *sections, last = key.split(".")
        if not sections and last not in config and last not in template[""]:
            known = sorted({*config, *template[""]})
            raise ValueError(
                f"{key} is neither an argument nor a key of the config. {_instead(key, last, known)}"
            )
        target, known_section = config, template
        for depth, section in enumerate(sections):
            path = ".".join(sections[: depth + 1])
            if not target.get(section) and (path in template if depth else section in known_section):
                target[section] = {}
            elif section not in target:
                known = sorted({*target, *(known_section or ())} - {""})
                hint = _instead(key, section, known)
                raise ValueError(f"{key}: the config has no section `{path}`. {hint}")
            target[section] = {} if target[section] is None else target[section]
            target, known_section = target[section], None
            if not isinstance(target, dict):
                kind = (
                    "a list; change it in the YAML" if isinstance(target, list) else f"the value {target!r}"
                )
                raise ValueError(f"{key}: `{path}` is no section but {kind}.")
        target[last] = value


def _instead(key: str, name: str, known: list[str]) -> str:
    """The sentence that ends a message about ``key``, of which ``name`` is unknown beside ``known``."""
    if is_setting(key):
        above = key.partition(f".{name}.")[0]
        empty = f"Its `{above}` is empty: use" if not known else "Use"
        return f"{empty} a YAML that has it, finetune_….yaml for training, predict_….yaml for prediction."
    near = settings_like(key)
    if near and near[0].endswith(f".{key}"):
        return f"Did you mean --{near[0]}?"
    if difflib.get_close_matches(name, known, n=1, cutoff=0.75) or not near:
        return did_you_mean(name, known)
    dashes = "" if "." in key else "--"
    return f"Did you mean {' or '.join(dashes + path for path in near)}?"


def did_you_mean(name: str, known: list[str]) -> str:
    """The sentence that ends a message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not close and not known:
        return ""
    return f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(known)}."
