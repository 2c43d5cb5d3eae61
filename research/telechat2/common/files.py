"""Files that are whole or absent: written under a temporary name, on the disk before they get their own.

And small JSON files, whose errors name the file.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research.telechat2.common.errors import UsageError


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


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no file.

    Raises:
        UsageError: it is something else.
    """
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise UsageError(f"{file} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds a JSON {type(content).__name__}, expected an object")
    return content


def json_bytes(content: object) -> bytes:
    """A JSON value as the content of a file."""
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def write_json(path: Path, content: object) -> None:
    """Write a JSON value under a temporary name in the same directory, fsync, rename."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(json_bytes(content))
