"""Small files that stand in the place of a large one that was never downloaded."""

from pathlib import Path

_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype html", b"<html", b"<?xml")
_ANSWERS = (b"entry not found", b"access to model", b"invalid username", b'{"error', b"not found")


def what_stands_here(file: Path) -> str:
    """What to add to a message about a file that cannot be read; "" if it is no such placeholder."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(200).lstrip().lower()
    except OSError:
        return ""
    if start.startswith(_POINTER):
        return " It is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder."
    if start.startswith(_PAGES) or start.startswith(_ANSWERS):
        return f" It is an answer of a web server, not the file: {start[:40].decode(errors='replace')!r}."
    return ""
