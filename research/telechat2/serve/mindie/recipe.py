"""A folder made by hand, as the README's recipe does it: what it lacks, from the installed plugin."""

from pathlib import Path

from research.telechat2.checkpoint.release.stated import said_of
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write
from research.telechat2.config.preflight import Facts, preflight
from research.telechat2.config.sections import section_of
from research.telechat2.config.yaml_files import read_config
from research.telechat2.serve.mindie import settings
from research.telechat2.serve.mindie.folder import model_config_of, world_size_of


def finish_folder(folder: Path) -> str:
    """Write ``config.json`` beside the one YAML of a folder, and make that YAML one that ModelRunner reads.

    The YAML gets the contents of its ``base_config``, which a copy of it alone no longer finds, and names
    ``telechat_mindie.py``, which is written too and takes everything from the installed plugin. Returns what
    was done, and what is left to do.
    """
    found = sorted(folder.glob("*.yaml"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise UsageError(
            f"{folder} must hold one .yaml file, since MindIE takes any; there is {listed}. Copy a predict "
            "YAML into it, or remove the others."
        )
    yaml_file = found[0]
    for name in ("config.json", f"{settings.ENTRY}.py"):
        if (folder / name).exists():
            raise UsageError(f"{folder / name} exists; remove it to have it written anew.")
    config = read_config(yaml_file)
    checkpoint = config.get("load_checkpoint") or ""
    facts = Facts(str(yaml_file), weights=bool(checkpoint), said=said_of(config, checkpoint))
    notes = preflight(config, facts).taken
    settings.check_predict_yaml(config, yaml_file)
    vocab_file = section_of(config, "processor.tokenizer").get("vocab_file") or ""
    world_size = world_size_of(config, yaml_file)
    served = settings.served_yaml(config, checkpoint, vocab_file, world_size)
    model_config = model_config_of(config, yaml_file, world_size)
    contents = {
        f"{settings.ENTRY}.py": Path(__file__).with_name(f"{settings.ENTRY}.py").read_text(encoding="utf-8"),
        yaml_file.name: settings.yaml_text(served),
        "config.json": settings.json_text(settings.config_json(model_config, served)),
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
            temporary.chmod(0o640)
    paths = {"load_checkpoint": checkpoint, "processor.tokenizer.vocab_file": vocab_file}
    left = ", ".join(key for key, path in paths.items() if not path)
    return (
        f"{folder}: wrote config.json and {settings.ENTRY}.py, and completed {yaml_file.name}.\n"
        + (f"Set in {yaml_file.name}: {left}.\n" if left else "")
        + "".join(f"{note}\n" for note in notes)
        + "MindIE requires chmod 750 for the folder and 640 for its files.\n"
    )
