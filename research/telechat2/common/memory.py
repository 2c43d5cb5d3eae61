"""What fits into a machine's memory at all: for sizes that are a slip of the finger, such as 99999999."""

import os
from collections.abc import Mapping
from pathlib import Path

from research.telechat2.common.errors import UsageError


def host_memory() -> int | None:
    """Bytes of memory and swap that this machine has, free or not; None: not known."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(lines[name].split()[0]) for name in ("MemTotal", "SwapTotal")) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def check_host_memory(parts: Mapping[str, float], settings: str, total: int | None = None) -> None:
    """Refuse what needs more than this machine has.

    Args:
        parts: what is kept -> its bytes, in all processes together; what is needed besides is left out.
        settings: what to lower, for the error.
        total: bytes of the machine; by default those of this one.

    Raises:
        UsageError: with every part.
    """
    total = host_memory() if total is None else total
    if total is None or sum(parts.values()) <= total:
        return
    listed = " and ".join(f"{size / 1e9:,.1f} GB for {name}" for name, size in parts.items() if size)
    raise UsageError(
        f"this run needs {listed}, but this machine has {total / 1e9:,.1f} GB; lower {settings}."
    )
