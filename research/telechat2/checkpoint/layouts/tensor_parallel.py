"""Layouts for inference: the part of one rank of a tensor-parallel group, and rows joined for one product.

``qkv_concat`` joins the rows of wq and wk_v, and those of w1 and w3 (``JOINED`` in the table). Joined rows
are stored for tensor-parallel size n: rank by rank, so that each rank's are together. Such a file is for n
ranks only, and its header records it. Every function has its inverse; tensors are views, nothing is read.
"""

from collections.abc import Iterable, Mapping, Sequence

from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.checkpoint.storage.views import glue, part_of, rows_of
from research.telechat2.checkpoint.table import (
    JOINED,
    ROWS,
    Joined,
    ignored_as,
    locate,
    locate_joined,
)
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError

Tensors = dict[str, StoredTensor]  # by MindSpore name
RowRange = tuple[str, int, int]  # name, first row, the row after the last


def check_divisible(sizes: TelechatSizes, tensor_parallel: int) -> None:
    """Refuse a group whose ranks would not get equal parts.

    Raises:
        UsageError: heads, kv heads, feed-forward size or vocabulary are no multiples of ``tensor_parallel``.
    """
    if tensor_parallel < 1:
        raise UsageError(f"tensor parallel is {tensor_parallel}; expected 1 or more ranks")
    if tensor_parallel == 1:
        return
    _require_heads(sizes, f"cutting it for {tensor_parallel} ranks")
    lengths = {
        "heads": sizes.num_heads,
        "key/value heads": sizes.n_kv_heads,
        "feed-forward size": sizes.intermediate_size,
        "vocabulary": sizes.vocab_size,
    }
    uneven = [f"{what} {n}" for what, n in lengths.items() if n and n % tensor_parallel]
    if uneven:
        raise UsageError(
            f"tensor parallel {tensor_parallel} does not divide {', '.join(uneven)} of this model; expected "
            "a number of ranks that divides heads, key/value heads, feed-forward size and vocabulary"
        )


def part_of_rank(
    whole: Mapping[str, StoredTensor], sizes: TelechatSizes, tensor_parallel: int, rank: int, qkv_concat: bool
) -> Tensors:
    """What ``rank`` of ``tensor_parallel`` ranks has of a whole model, which ``check_divisible`` accepts.

    Args:
        whole: all weights by name, as the training model has them.
        sizes: with heads, where there are several ranks or rows to join.
        qkv_concat: join the rows.

    Raises:
        UsageError: heads that are unknown, or parts of different dtypes to be joined.
    """
    own = {}
    for name, tensor in whole.items():
        axis = _split_axis(name)
        own[name] = tensor if axis is None else part_of(tensor, axis, rank, tensor_parallel)
    return _with_joined(whole, own, sizes, tensor_parallel, [rank]) if qkv_concat else own


def join_rows(whole: Mapping[str, StoredTensor], sizes: TelechatSizes, tensor_parallel: int) -> Tensors:
    """A whole model with joined rows, those of each rank together; see part_of_rank."""
    return _with_joined(whole, whole, sizes, tensor_parallel, range(tensor_parallel))


def is_joined(names: Iterable[str]) -> bool:
    """Whether a checkpoint of these names has joined rows."""
    return any(map(locate_joined, names))


def part_rows(
    tensors: Iterable[StoredTensor], sizes: TelechatSizes, tensor_parallel: int
) -> list[StoredTensor]:
    """The inverse of ``join_rows``; what is not joined stays as it is.

    Raises:
        UsageError: a joined tensor is not of the shape that ``sizes`` make, or sizes as in ``part_of_rank``.
    """
    check_divisible(sizes, tensor_parallel)
    parted = []
    for tensor in tensors:
        found = locate_joined(tensor.name)
        parted += [tensor] if found is None else _part(tensor, *found, sizes, tensor_parallel)
    return parted


def glue_ranks(ranks: Sequence[Mapping[str, StoredTensor]]) -> list[StoredTensor]:
    """Whole tensors from what all ranks have; joined rows stay stored for so many ranks.

    Of what is no weight, one rank's is given.

    Raises:
        UsageError: a rank lacks a weight, or has one of another shape or dtype, or another value of one that
            all have whole.
    """
    whole = []
    for name in dict.fromkeys(name for tensors in ranks for name in tensors):
        having = [tensors[name] for tensors in ranks if name in tensors]
        first = having[0]
        if ignored_as(name, "mindspore") or first.dtype not in WIDTH:
            whole.append(first)
            continue
        _require_alike(name, ranks)
        axis = _split_axis(name)
        if axis is not None and axis < len(first.shape):
            first = glue(having, axis)
        else:
            require_same(having, "the ranks are of different checkpoints, or not of a tensor-parallel group")
        whole.append(first)
    return whole


def _with_joined(
    whole: Mapping[str, StoredTensor],
    others: Mapping[str, StoredTensor],
    sizes: TelechatSizes,
    tensor_parallel: int,
    ranks: Iterable[int],
) -> Tensors:
    """``others`` with joined tensors, of the rows of ``whole`` that ``ranks`` have, in place of parts."""
    _require_heads(sizes, "joining its rows (qkv_concat)")
    result = dict(others)
    for joined in JOINED:
        for layer in range(sizes.num_layers):
            parts = dict.fromkeys(part.format(i=layer) for part, _ in joined.parts)
            if not parts.keys() & whole.keys():  # experts
                continue
            dtypes = {whole[part].dtype: part for part in parts}
            if len(dtypes) > 1:
                names = " but ".join(f"{part} is {dtype}" for dtype, part in dtypes.items())
                raise UsageError(f"{names}; rows of different dtypes cannot be joined: convert them to one")
            ranges = (_ranges(joined, layer, sizes, tensor_parallel, rank) for rank in ranks)
            pieces = [(whole[part], first, last) for rows in ranges for part, first, last in rows]
            for part in parts:
                del result[part]
            name, count = joined.mindspore.format(i=layer), sum(last - first for _, first, last in pieces)
            result[name] = rows_of(pieces, name, (count, sizes.hidden_size))
    return result


def _part(
    tensor: StoredTensor, joined: Joined, layer: int, sizes: TelechatSizes, tensor_parallel: int
) -> list[StoredTensor]:
    _require_heads(sizes, f"taking {tensor.name} apart")
    # Of each part, its row ranges as (first row, where they begin in the joined tensor, and end).
    places: dict[str, list[tuple[int, int, int]]] = {}
    end = 0
    for rank in range(tensor_parallel):
        for part, first, last in _ranges(joined, layer, sizes, tensor_parallel, rank):
            begin, end = end, end + last - first
            places.setdefault(part, []).append((first, begin, end))
    expected = (end, sizes.hidden_size)
    if tensor.shape != expected:
        raise UsageError(
            f"{tensor.name} {list(tensor.shape)} in {tensor.file} should be {list(expected)} in a model of "
            f"{sizes.describe()}; the config or the weights belong to another model"
        )
    parts = []
    for part, ranges in places.items():
        pieces = [(tensor, begin, end) for _, begin, end in sorted(ranges)]
        rows = sum(end - begin for _, begin, end in pieces)
        parts.append(rows_of(pieces, part, (rows, sizes.hidden_size)))
    return parts


def _ranges(
    joined: Joined, layer: int, sizes: TelechatSizes, tensor_parallel: int, rank: int
) -> list[RowRange]:
    """The rows of the whole parts that make a rank's rows of a joined tensor, in order."""
    dims = sizes.dims()
    ranges: list[RowRange] = []
    for part, which in joined.parts:
        row = next(row for row in ROWS if row.mindspore == part)
        count = dims[row.shape[0]] // tensor_parallel
        name, start = part.format(i=layer), rank * count
        if which == "all":
            ranges.append((name, start, start + count))
            continue
        head_dim = sizes.head_dim
        offset = 0 if which == "keys" else head_dim
        firsts = range(start + offset, start + count, 2 * head_dim)
        ranges += [(name, first, first + head_dim) for first in firsts]
    return ranges


def _split_axis(name: str) -> int | None:
    if locate_joined(name):
        return 0
    place = locate(name, "mindspore")
    return place.row.split if place else None


def _require_heads(sizes: TelechatSizes, doing: str) -> None:
    if sizes.num_heads is None or sizes.n_kv_heads is None:
        raise UsageError(
            f"{doing} needs the number of heads, which the tensors do not show; put the model's config.json "
            "beside them, or give convert_weight.py --model_name, such as telechat_7B"
        )


def _require_alike(name: str, ranks: Sequence[Mapping[str, StoredTensor]]) -> None:
    if lacking := [rank for rank, tensors in enumerate(ranks) if name not in tensors]:
        raise UsageError(
            f"rank {lacking[0]} lacks {name}, which other ranks have; expected the same names in all "
            f"{len(ranks)} ranks. Copy the files of all ranks of one checkpoint again"
        )
    first = ranks[0][name]
    for other in (tensors[name] for tensors in ranks):
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise UsageError(
                f"{other.file} holds {name} as {other.dtype} {list(other.shape)}, but {first.file} as "
                f"{first.dtype} {list(first.shape)}; the ranks are of different checkpoints"
            )


def require_same(tensors: Sequence[StoredTensor], reason: str) -> None:
    """UsageError, with ``reason`` what that shows, if tensors of several ranks are not the same."""
    first, *others = tensors
    expected = first.checksum() if others else ""
    for other in others:
        if other.kind != first.kind or other.checksum() != expected:
            raise UsageError(
                f"{first.file} and {other.file} hold different values of {first.name}, of which every rank "
                f"has a copy: {reason}"
            )
