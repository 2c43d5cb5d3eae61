"""Weights given to the wrong command are named as what they are; only names and headers are read."""

from pathlib import Path

from research.telechat2.checkpoint.storage.folders import TRACKER
from research.telechat2.checkpoint.storage.safetensors_format import read_safetensors
from research.telechat2.checkpoint.table import canonical_name
from research.telechat2.common.errors import UsageError

# Beginnings of names that one side alone has; a Llama's layers begin as MindSpore's.
_MINDSPORE = ("model.tok_embeddings.", "model.norm_out.")
_TORCH = ("transformer.", "model.embed_tokens.")


def refuse_mindspore(path: Path) -> None:
    """UsageError if a path for torch weights holds a MindSpore checkpoint."""
    if path.suffix == ".ckpt" and path.is_file():
        found = "a .ckpt file"
    elif path.is_dir() and (any(path.glob("rank_*/")) or (path / TRACKER).is_file()):
        found = "the folder of a MindSpore run"
    elif path.is_dir() and any(path.glob("*.ckpt")) and not any(path.glob("*.safetensors")):
        found = "a folder of .ckpt files"
    elif not (name := _name_of(path, _MINDSPORE)):
        return
    else:
        found = f"its tensors have MindSpore's names, such as {name}"
    raise UsageError(
        f"{path} holds MindSpore weights already ({found}), not torch weights. Commands of prediction and "
        "training take them as they are; for another layout give them as --pre_ckpt_path, and for torch "
        "weights use convert_reversed.py --mindspore_path"
    )


def refuse_torch(path: Path) -> None:
    """UsageError if a path for a MindSpore checkpoint holds torch weights."""
    if path.suffix == ".bin" and path.is_file():
        found = "a .bin file"
    elif path.is_dir() and any(path.glob("pytorch_model*.bin")) and not any(path.glob("*.safetensors")):
        found = "pytorch_model*.bin"
    elif not (name := _name_of(path, _TORCH)):
        return
    else:
        found = f"its tensors have names such as {name}"
    raise UsageError(
        f"{path} holds torch weights already ({found}), not a MindSpore checkpoint; to convert them to one "
        "use convert_weight.py --torch_path"
    )


def _name_of(path: Path, beginnings: tuple[str, ...]) -> str | None:
    """A tensor name of safetensors that begins so; broken files are left to the readers."""
    side = "torch" if beginnings is _TORCH else "mindspore"
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.safetensors"))
    for file in files:
        if file.suffix == ".safetensors":
            try:
                names = [tensor.name for tensor in read_safetensors(file)]
            except (ValueError, OSError):
                continue
            if found := next((n for n in names if canonical_name(n, side).startswith(beginnings)), None):
                return found
    return None
