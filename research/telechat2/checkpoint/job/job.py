"""What is converted, what a user may ask of it, and what it came to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from research.telechat2.checkpoint.storage.tensor import StoredTensor, Weights
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError


def check_choice(what: str, value: str | None, choices: Iterable[str]) -> None:
    """UsageError if ``value`` is given, but none of ``choices``."""
    if value is not None and value not in choices:
        raise UsageError(f"{what} {value!r} is unknown; expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class Options:
    """What a user may ask of any conversion.

    ``dtype`` (float32, float16, bfloat16) of the new weights, None: as they are. ``max_shard_size``: bytes of
    a file at most, None: 5 GB in a folder. ``dry_run``: only say what would be done. ``verify``: read the
    result and prove that it is what was read. ``resume``: go on where an earlier run was stopped, and keep
    what is done if this one is.
    """

    dtype: str | None = None
    max_shard_size: int | None = None
    dry_run: bool = False
    verify: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, WIDTH)
        if self.max_shard_size is not None and self.max_shard_size <= 0:
            raise UsageError(f"max_shard_size is {self.max_shard_size}; expected a positive number of bytes")


@dataclass(frozen=True)
class Job:
    """What is converted.

    ``source`` is what the user named; ``sources`` every weight that is read, under the name that ``back``
    gives it; ``files`` the new files, by their names relative to the output folder, with their weights.
    ``back`` is the inverse: from the tensors of the written files to tensors made of their bytes, named as in
    ``sources``, without any that were made up. ``framework``, pt or ms, and ``layout`` go into the headers,
    ``layout`` into the manifest too. ``beside``: small files and their content. ``notes``: lines for the
    summary. ``ignored``: what is left out of the source, counted by kind.
    """

    source: Path
    sources: Mapping[str, StoredTensor]
    files: Mapping[str, Weights]
    back: Callable[[list[StoredTensor]], Weights]
    framework: str
    beside: Mapping[str, bytes] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """Those of all files."""
        return [weight for weights in self.files.values() for weight in weights]

    def nbytes(self, dtype: str | None) -> int:
        """Bytes of all new tensors, as ``dtype`` or each as it is."""
        return sum(tensor.nbytes(dtype) for tensor, _ in self.weights)


@dataclass(frozen=True)
class Written:
    """What a conversion read and wrote, or (``table``) would have; ``ignored`` as in Job."""

    sources: tuple[Path, ...]
    files: tuple[Path, ...]
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    nan: int
    inf: int
    seconds: float
    verified: bool
    table: str | None
    notes: tuple[str, ...]
    ignored: Mapping[str, int]

    def __str__(self) -> str:
        done, size = self.table is None, f"{self.tensors:,} tensors, {self.parameters:,} parameters"
        lines = [] if self.table is None else [self.table]
        lines += [
            f"read {', '.join(map(str, self.sources[:3]))}"
            + (f" and {len(self.sources) - 3} more files" if len(self.sources) > 3 else ""),
            f"{'wrote' if done else 'would write'} {size}, {self.bytes:,} bytes, "
            f"{' and '.join(self.dtypes)}, to {self.files[0]}"
            + (f" and {len(self.files) - 1} more files" if len(self.files) > 1 else ""),
            *self.notes,
        ]
        if done:
            proof = "verified: every tensor read back, and traced to its source"
            lines += [
                f"values that are not numbers: {self.nan:,} NaN, {self.inf:,} infinite",
                f"{proof if self.verified else 'not verified'}; {self.seconds:.1f} s, "
                f"{self.bytes / max(self.seconds, 1e-3) / 1e9:.2f} GB/s",
            ]
        return "\n".join(lines)
