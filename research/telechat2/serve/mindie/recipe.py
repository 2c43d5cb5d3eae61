"""A folder made by hand, as the README's recipe does it: what it lacks, from the installed plugin."""

import tempfile
from pathlib import Path

from research.telechat2.checkpoint.llama.stated import said_of
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write
from research.telechat2.config.overrides import load_yaml
from research.telechat2.config.preflight import Facts, preflight
from research.telechat2.config.sections import section_of
from research.telechat2.config.yaml_files import read_config, shipped_configs
from research.telechat2.serve.mindie import settings
from research.telechat2.serve.mindie.folder import dump_json, dump_yaml, model_config_of, world_size_of


def finish_folder(folder: Path) -> str:
    """Write ``config.json`` beside the one YAML of a folder, and make that YAML one that ModelRunner reads.

    The YAML gets the contents of its ``base_config``, which a copy of it alone no longer finds, and names
    ``telechat_mindie.py``, which is written too and takes everything from the installed plugin.

    Returns:
        What was done, and what is left to do.

    Raises:
        UsageError: there is no YAML or several, it is none of a prediction, or config.json exists.
    """
    yaml_file = _only_yaml(folder)
    for name in ("config.json", f"{settings.ENTRY}.py"):
        if (folder / name).exists():
            raise UsageError(f"{folder / name} exists; remove it to have it written anew.")
    config = _read_copy(yaml_file)
    weights = config.get("load_checkpoint")
    facts = Facts(str(yaml_file), weights=bool(weights), said=said_of(config, weights))
    notes = preflight(config, facts).taken
    settings.check_predict_yaml(config, yaml_file)
    world_size = world_size_of(config, yaml_file)
    served = settings.served_yaml(
        config, checkpoint=config.get("load_checkpoint") or "",
        vocab_file=section_of(config, "processor.tokenizer").get("vocab_file") or "",
        world_size=world_size,
    )  # fmt: skip
    model_config = model_config_of(config, yaml_file, world_size)
    contents = {
        f"{settings.ENTRY}.py": Path(__file__).with_name(f"{settings.ENTRY}.py").read_text(encoding="utf-8"),
        yaml_file.name: dump_yaml(served),
        "config.json": dump_json(settings.config_json(model_config, served)),
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
            temporary.chmod(0o640)
    left = ", ".join(key for key, value in _paths(served).items() if not value)
    return (
        f"{folder}: wrote config.json and {settings.ENTRY}.py, and completed {yaml_file.name}.\n"
        + (f"Set in {yaml_file.name}: {left}.\n" if left else "")
        + "".join(f"{note}\n" for note in notes)
        + "MindIE wants chmod 750 for the folder and 640 for its files.\n"
    )


def _only_yaml(folder: Path) -> Path:
    found = sorted(folder.glob("*.yaml"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise UsageError(
            f"{folder} must hold exactly one .yaml file, the model's, since MindIE takes any; there is "
            f"{listed}. Copy a predict YAML into it, or remove the others."
        )
    return found[0]


def _read_copy(yaml_file: Path) -> dict:
    """A YAML with its bases, which for the copy of a shipped file are those of the plugin."""
    own = load_yaml(yaml_file.read_text(encoding="utf-8"))
    base = own.get("base_config") if isinstance(own, dict) else None
    if not isinstance(base, str) or (yaml_file.parent / base).is_file():
        return read_config(yaml_file)
    for folder in sorted({path.parent for path in shipped_configs()}):
        if (folder / base).is_file():
            own["base_config"] = str((folder / base).resolve())
            with tempfile.TemporaryDirectory() as place:
                copy = Path(place) / yaml_file.name
                copy.write_text(dump_yaml(own), encoding="utf-8")
                return read_config(copy)
    raise UsageError(
        f"{yaml_file} stands on base_config {base}, which is neither beside it nor in the installed plugin; "
        f"copy that file too, or use a shipped YAML."
    )


def _paths(served: dict) -> dict[str, str]:
    return {
        "load_checkpoint": served["load_checkpoint"],
        "processor.tokenizer.vocab_file": served["processor"]["tokenizer"]["vocab_file"],
    }
