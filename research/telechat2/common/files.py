"""Files that are whole or absent: written under a temporary name, on the disk before they get their own."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory, which becomes ``path`` when the body has succeeded.

    The temporary name ends like ``path``, since libraries go by that. A failure or an interrupt leaves
    nothing behind. A file at ``path`` is replaced: whoever must not overwrite checks before.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: str | Path) -> None:
    """Have the operating system put a file's content, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: object) -> None:
    """Write ``content`` under a temporary name in the same directory, fsync, rename."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
