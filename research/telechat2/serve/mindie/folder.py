"""The folder that MindIE starts from: checked before anything is written, whole or absent."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from research.telechat2.common.errors import UsageError, naming
from research.telechat2.common.files import fsync
from research.telechat2.config.sections import section_of
from research.telechat2.config.sharing import check_memory
from research.telechat2.infer.sources import Sources, check_weights, open_tokenizer, read_sources
from research.telechat2.serve.mindie import settings
from research.telechat2.serve.mindie.copied_code import copy_code

SELF_TEST = Path(__file__).with_name("self_test.py")


@dataclass
class FolderSources(Sources):
    """What a folder is made of; ``model_config``: the YAML's TelechatConfig; ``world_size``: NPUs."""

    model_config: object
    prompt_format: str
    world_size: int


def read_folder_sources(
    yaml_file: Path,
    checkpoint: Path | None,
    vocab_file: Path | None,
    prompt_format: str | None,
    world_size: int | None,
) -> FolderSources:
    """Read and check what a folder is to be made of; of the weights only their headers.

    Args:
        yaml_file: see infer.sources.read_sources, as the next two.
        checkpoint: weights of any layout, torch or MindSpore.
        vocab_file: tokenizer.model, or the folder that it is in.
        prompt_format: "chat", "plain" or "v1"; by default as infer.sources.choose_prompt_format says.
        world_size: NPUs; by default as ``world_size_of`` says.
    """
    sources = read_sources(yaml_file, checkpoint, vocab_file)
    sources.checkpoint, sources.vocab_file = sources.checkpoint.absolute(), sources.vocab_file.absolute()
    settings.check_predict_yaml(sources.config, yaml_file)
    if sources.vocab_file.suffix == ".json":
        raise UsageError(
            f"{sources.vocab_file} is no SentencePiece model, which a folder for MindIE needs; give the "
            "tokenizer.model of a TeleChat2 release."
        )
    world_size = world_size or world_size_of(sources.config, yaml_file)
    model_config = model_config_of(sources.config, yaml_file, world_size)
    _, prompt_format = open_tokenizer(sources, model_config, prompt_format)
    check_weights(sources.checkpoint, model_config, world_size)
    return FolderSources(
        **vars(sources), model_config=model_config, prompt_format=prompt_format, world_size=world_size
    )


def world_size_of(config: dict, yaml_file: Path) -> int:
    """NPUs that a YAML speaks of: ``parallel_config.model_parallel`` where use_parallel is True, else 1."""
    if not config.get("use_parallel"):
        return 1
    if (shared := section_of(config, "parallel_config").get("model_parallel")) is None:
        raise UsageError(
            f"{yaml_file}: use_parallel is True, but parallel_config has no model_parallel; set it to the "
            "number of NPUs, or give build_mindie_folder.py --world_size."
        )
    return shared


def model_config_of(config: dict, yaml_file: Path, world_size: int):
    """The YAML's TelechatConfig, with every value that its own rules give, if so many NPUs can hold it."""
    from research.telechat2.telechat_config import TelechatConfig

    given = section_of(config, "model.model_config") | {
        "moe_config": config.get("moe_config"),
        "parallel_config": settings.parallel_plan(config, world_size),
    }
    context = section_of(config, "context")
    with naming(yaml_file):
        model_config = TelechatConfig(**given)
        if context.get("device_target", "Ascend") == "Ascend":
            check_memory(model_config, world_size, context.get("max_device_memory", "58GB"))
        return model_config


def build(sources: FolderSources, folder: Path, *, npu_mem_size: int, self_test: bool | None = None) -> str:
    """Write the folder, and return what is left to do.

    Args:
        sources: see read_folder_sources.
        folder: a path that does not exist.
        npu_mem_size: GB of every NPU for the cache.
        self_test: ask the folder's model before the folder gets its name; None: if its target is one CPU.
    """
    folder = folder.expanduser().absolute()
    if not re.fullmatch(r"[A-Za-z0-9_-]+", folder.name):
        raise UsageError(
            f"the folder's name {folder.name!r} becomes a package's; use letters, digits, _ and - only."
        )
    if self_test is None:
        on_cpu = section_of(sources.config, "context").get("device_target") == "CPU"
        self_test = on_cpu and sources.world_size == 1
    if self_test and sources.world_size > 1:
        raise UsageError(
            f"the self-test loads one process, but the folder is for {sources.world_size} NPUs; give "
            f"--self_test False, or --world_size 1."
        )
    if folder.exists():
        raise UsageError(f"{folder} exists; give another --output_path, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, world_size = sources.model_config, sources.world_size
    service = settings.service_config(model, folder, world_size=world_size, npu_mem_size=npu_mem_size)
    text = settings.instructions(service, sources.prompt_format)
    vocab_file = str(folder / "tokenizer.model")
    served = settings.served_yaml(sources.config, str(sources.checkpoint), vocab_file, world_size)
    tokenizer = settings.tokenizer_config(served["processor"]["tokenizer"], sources.prompt_format)
    contents = {
        "mindie.txt": text,
        f"{sources.yaml_file.stem}.yaml": settings.yaml_text(served),
        "config.json": settings.json_text(settings.config_json(model, served)),
        "tokenizer_config.json": settings.json_text(tokenizer),
        "generation_config.json": settings.json_text(settings.generation_config(model)),
    }
    with tempfile.TemporaryDirectory(prefix=".part_", dir=folder.parent) as place:
        staged = Path(place) / folder.name  # MindFormers names a package after the folder
        staged.mkdir()
        for name, content in contents.items():
            (staged / name).write_text(content, encoding="utf-8")
        shutil.copyfile(sources.vocab_file, staged / "tokenizer.model")
        copy_code(staged)
        for path in (*staged.rglob("*"), staged):
            path.chmod(0o750 if path.is_dir() else 0o640)  # MindIE refuses what others may write or read
            fsync(path)
        report = test_folder(staged) if self_test else ""
        os.rename(staged, folder)
        fsync(folder.parent)
    return f"{report}{text}"


def test_folder(folder: Path) -> str:
    """Ask the folder's model one question as MindIE would, in a process elsewhere; return what to print."""
    with tempfile.TemporaryDirectory() as elsewhere:
        answer = Path(elsewhere) / "answer.json"
        environment = os.environ | {"GLOG_v": "3", "LOG_MF_PATH": elsewhere}
        for name in ("REGISTER_PATH", "OM_MODULES_CACHE"):  # where MindFormers looks for code of a run
            environment.pop(name, None)
        words = [sys.executable, "-P", SELF_TEST, folder, settings.QUESTION, "16", answer]
        told = subprocess.run(
            words, cwd=elsewhere, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if told.returncode:
            reason = (told.stdout.strip().splitlines() or ["no output"])[-1]
            raise UsageError(
                f"the self-test failed, and nothing was written: ModelRunner ended with {reason!r}; "
                "--self_test False writes the folder without a test."
            )
        found = json.loads(answer.read_text(encoding="utf-8"))
    return (
        f"self-test: ModelRunner loaded the folder in {found['seconds_to_load']:.0f} s; asked "
        f"{settings.QUESTION!r} it begins to answer: {found['text']!r}\n\n"
    )
