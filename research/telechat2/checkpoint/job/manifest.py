"""manifest.json: what a conversion read and wrote, tensor by tensor; and the table that a dry run prints."""

import json
import platform
from bisect import bisect_right
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from research.telechat2.checkpoint.job.copy import Content
from research.telechat2.checkpoint.job.job import Job, Options
from research.telechat2.checkpoint.storage.tensor import StoredTensor

NAME = "manifest.json"
FORMAT = "telechat2 conversion 1"
CHECKSUM = "xxh3_128 of the bytes of the tensor as stored"


def manifest_bytes(
    job: Job,
    options: Options,
    read: Mapping[Path, tuple[int, int]],
    sizes: Mapping[str, int],
    contents: Mapping[tuple[str, str], Content],
) -> bytes:
    """The content of a manifest, the same for the same conversion: it holds no time.

    ``read``: each source file with its bytes and time of change; ``sizes``: bytes of each new file;
    ``contents``: by file and tensor.
    """
    origin_of = origins(job.sources)
    written = {}
    for file, weights in job.files.items():
        tensors = {}
        for tensor, name in weights:
            content = contents[file, name]
            odd = {"nan": content.nan, "inf": content.inf}
            tensors[name] = {
                "dtype": options.dtype or tensor.dtype,
                "shape": list(tensor.shape),
                "checksum": content.checksum,
                "source": origin_of(tensor),
                **{key: count for key, count in odd.items() if count},
            }
        written[file] = {"bytes": sizes[file], "tensors": tensors}
    content_of_file = {
        "format": FORMAT,
        "checksum": CHECKSUM,
        "versions": _versions(),
        "source": {
            "path": str(job.source.absolute()),
            "files": {str(file.absolute()): {"bytes": size} for file, (size, _) in read.items()},
        },
        "options": {"dtype": options.dtype, "verified": options.verify, "layout": dict(job.layout)},
        "files": written,
    }
    return (json.dumps(content_of_file, ensure_ascii=False, indent=1) + "\n").encode()


def origins(sources: Mapping[str, StoredTensor]) -> Callable[[StoredTensor], list[str]]:
    """A function from a tensor to the names of the sources that its bytes are of.

    A tensor whose bytes lie in no known place is called by its own name.
    """
    by_file: dict[Path, list[tuple[int, int, str]]] = {}
    for tensor in sources.values():
        for file, begin, end in tensor.extents or ():
            by_file.setdefault(file, []).append((begin, end, tensor.name))
    for ranges in by_file.values():
        ranges.sort()

    def origin_of(tensor: StoredTensor) -> list[str]:
        names: dict[str, None] = {}
        for file, begin, end in tensor.extents or ():
            ranges = by_file.get(file, [])
            number = max(0, bisect_right(ranges, begin, key=lambda item: item[0]) - 1)
            for first, last, name in ranges[number:]:
                if first >= end:
                    break
                if last > begin:
                    names[name] = None
        return list(names) or [tensor.name]

    return origin_of


def table(job: Job, dtype: str | None) -> str:
    """Every tensor of every new file: where it comes from, its name there, shape, dtype, bytes."""
    origin_of = origins(job.sources)
    lines = []
    for file, weights in job.files.items():
        nbytes = sum(tensor.nbytes(dtype) for tensor, _ in weights)
        lines.append(f"{file}: {len(weights):,} tensors, {nbytes:,} bytes")
        for tensor, name in weights:
            names = origin_of(tensor)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            kind = tensor.dtype if dtype in (None, tensor.dtype) else f"{tensor.dtype} -> {dtype}"
            shape = "x".join(map(str, tensor.shape)) or "1"
            lines.append(f"  {names[0]}{more} -> {name}  {shape}  {kind}  {tensor.nbytes(dtype):,}")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("telechat2-mindformers", "numpy", "xxhash"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            continue
    return versions
