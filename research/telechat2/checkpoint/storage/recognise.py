"""Whose names the weights at a path have, torch's or MindSpore's; only names and headers are read."""

from dataclasses import dataclass
from pathlib import Path

from research.telechat2.checkpoint.storage.folders import TRACKER, rank_folders, visible
from research.telechat2.checkpoint.storage.safetensors_format import read_safetensors
from research.telechat2.checkpoint.table import Side, canonical_name
from research.telechat2.common.errors import UsageError

# Beginnings of names that one side alone has; a Llama's layers begin as MindSpore's.
_BEGINNINGS: dict[Side, tuple[str, ...]] = {
    "mindspore": ("model.tok_embeddings.", "model.norm_out."),
    "torch": ("transformer.", "model.embed_tokens."),
}
_OF_LLAMA = ("model.embed_tokens.", ".self_attn.q_proj.weight")


@dataclass(frozen=True)
class Recognised:
    """``side``: None where nothing tells. ``sign``: what shows it. ``llama``: torch weights of a Llama."""

    side: Side | None
    sign: str = ""
    llama: bool = False


def recognise(path: Path) -> Recognised:
    """What kind of weights a path holds; broken files are left to the readers."""
    if path.is_dir() and (rank_folders(path) or (path / TRACKER).is_file()):
        return Recognised("mindspore", "the folder of a MindSpore run")
    files = [path] if path.is_file() else visible(path, "*.safetensors", "pytorch_model*.bin", "*.ckpt")
    for file in files:
        if file.suffix in (".bin", ".ckpt"):
            return Recognised("torch" if file.suffix == ".bin" else "mindspore", f"as {file.name}")
        if file.suffix == ".safetensors" and (found := _by_names(file)):
            return found
    return Recognised(None)


def _by_names(file: Path) -> Recognised | None:
    try:
        names = [tensor.name for tensor in read_safetensors(file)]
    except (UsageError, OSError):
        return None
    for name in names:
        if name.startswith(_OF_LLAMA[0]) or name.endswith(_OF_LLAMA[1]):
            return Recognised("torch", f"a tensor is called {name}", llama=True)
        for side, beginnings in _BEGINNINGS.items():
            if canonical_name(name, side).startswith(beginnings):
                return Recognised(side, f"a tensor is called {name}")
    return None


def refuse_mindspore(path: Path) -> None:
    """UsageError if a path for torch weights holds a MindSpore checkpoint."""
    if (found := recognise(path)).side == "mindspore":
        raise UsageError(
            f"{path} holds MindSpore weights already ({found.sign}); expected torch weights. For another "
            "layout give it as --pre_ckpt_path; for torch weights use convert_reversed.py --mindspore_path"
        )


def refuse_torch(path: Path) -> None:
    """UsageError if a path for a MindSpore checkpoint holds torch weights."""
    if (found := recognise(path)).side == "torch":
        raise UsageError(
            f"{path} holds torch weights already ({found.sign}); expected a MindSpore checkpoint. Convert "
            "them with convert_weight.py --torch_path"
        )


def is_torch_source(path: Path) -> bool:
    """Whether ``path`` is an HF folder of a TeleChat model, or one of its files; UsageError if of a Llama."""
    found = recognise(path)
    if found.llama:
        raise UsageError(
            f"{path} holds a Llama model, which needs YAMLs of its own; make them and its weights with "
            f"research/telechat2/convert_weight.py --torch_path {path} --mindspore_path NEW_DIR"
        )
    return found.side == "torch"
