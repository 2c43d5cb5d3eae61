"""What a path of weights is: a file, a folder, an iteration of a training, ranks."""

from pathlib import Path

from research.telechat2.checkpoint.storage.folders import TRACKER
from research.telechat2.common.errors import UsageError
from research.telechat2.run.resuming import COMMON, whole_iterations


def checkpoint_kind(path: Path) -> str:
    """What ``path`` is: ``ckpt`` or ``safetensors`` (a file), ``ckpt folder``, ``safetensors folder``,
    ``iteration`` (written by the ``checkpoint:`` section) or ``ranks`` (a folder of ``rank_*`` folders).

    Raises:
        UsageError: it does not exist, or is none of these.
    """
    if path.is_file():
        if path.suffix in (".ckpt", ".safetensors"):
            return path.suffix[1:]
        raise UsageError(f"{path} is no checkpoint: its name must end in .safetensors or .ckpt.")
    if not path.is_dir():
        raise UsageError(
            f"there is no checkpoint {path}; give --load_checkpoint a file or a directory that exists."
        )
    if (path / TRACKER).is_file() or (path / COMMON).is_file():
        return "iteration"
    if any(path.glob("rank_*/")):
        return "ranks"
    found = [suffix for suffix in ("safetensors", "ckpt") if any(path.glob(f"*.{suffix}"))]
    if len(found) == 1:
        return f"{found[0]} folder"
    if found:
        raise UsageError(
            f"{path} holds both .safetensors and .ckpt files; give the one file that is to be loaded."
        )
    if any(path.glob("iteration_*/")):
        whole = whole_iterations(path)
        instead = f"give the latest that is whole: --load_checkpoint {whole[0]}" if whole else "none is whole"
        raise UsageError(
            f"{path} holds iterations, but no {TRACKER}, which names the last that was saved; {instead}."
        )
    inside = path / "checkpoint"
    hint = f" Did you mean {inside}?" if inside.is_dir() else ""
    raise UsageError(f"{path} holds no checkpoint: no .safetensors, no .ckpt, no rank_* folder.{hint}")
