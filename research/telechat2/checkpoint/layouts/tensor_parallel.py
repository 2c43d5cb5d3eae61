"""Layouts for inference: the part of one rank of a tensor-parallel group, and rows joined for one product.

``qkv_concat`` joins the rows of wq and wk_v, and those of w1 and w3 (``JOINED`` in the table). For a group
of n ranks the joined rows are arranged rank by rank, so that each rank's are together: such a file is for n
ranks only, and says so in its header. Every function has its inverse; tensors are views, nothing is read.
"""

from collections.abc import Iterable, Mapping

from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.storage.dtypes import WIDTH
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.checkpoint.storage.views import glue, part_of, rows_of
from research.telechat2.checkpoint.table import JOINED, ROWS, Joined, ignored_as, place
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
    uneven = [f"{what} {length}" for what, length in lengths.items() if length % tensor_parallel]
    if uneven:
        raise UsageError(
            f"tensor parallel {tensor_parallel} does not divide {', '.join(uneven)} of this model; expected "
            "a number of ranks that divides heads, key/value heads, feed-forward size and vocabulary"
        )


def part_of_rank(
    whole: Mapping[str, StoredTensor], sizes: TelechatSizes, tensor_parallel: int, rank: int, qkv_concat: bool
) -> Tensors:
    """What ``rank`` of ``tensor_parallel`` ranks has of a whole model.

    Args:
        whole: all weights by name, as the training model has them.
        sizes: with heads, where there are several ranks or rows to join.
        qkv_concat: join the rows.

    Raises:
        UsageError: sizes that do not divide or are unknown, or parts of different dtypes to be joined.
    """
    check_divisible(sizes, tensor_parallel)
    if not 0 <= rank < tensor_parallel:
        raise UsageError(f"rank is {rank}; expected 0 to {tensor_parallel - 1}, as tensor parallel says")
    own = {}
    for name, tensor in whole.items():
        axis = _split_axis(name)
        own[name] = tensor if axis is None else part_of(tensor, axis, rank, tensor_parallel)
    if not qkv_concat:
        return own
    return _with_joined(whole, own, sizes, lambda joined, i: _ranges(joined, i, sizes, tensor_parallel, rank))


def join_rows(whole: Mapping[str, StoredTensor], sizes: TelechatSizes, tensor_parallel: int) -> Tensors:
    """A whole model with joined rows, those of each of ``tensor_parallel`` ranks together.

    Raises:
        UsageError: as ``part_of_rank``.
    """
    check_divisible(sizes, tensor_parallel)

    def of_all_ranks(joined: Joined, layer: int) -> list[RowRange]:
        ranks = range(tensor_parallel)
        return [rows for rank in ranks for rows in _ranges(joined, layer, sizes, tensor_parallel, rank)]

    return _with_joined(whole, whole, sizes, of_all_ranks)


def is_joined(names: Iterable[str]) -> bool:
    """Whether a checkpoint of these names has joined rows."""
    return any(place(name, joined, "mindspore") for name in names for joined in JOINED)


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
        found = next(((j, at[0]) for j in JOINED if (at := place(tensor.name, j, "mindspore"))), None)
        parted += [tensor] if found is None else _part(tensor, *found, sizes, tensor_parallel)
    return parted


def glue_ranks(ranks: list[Mapping[str, StoredTensor]]) -> list[StoredTensor]:
    """Whole tensors from what all ranks have, joined rows arranged for so many ranks.

    Of what is no weight, one rank's is given.

    Raises:
        UsageError: a rank lacks a weight, or has one of another shape or dtype, or another value of one that
            all have whole.
    """
    whole = []
    for name in dict.fromkeys(name for tensors in ranks for name in tensors):
        having = [tensors[name] for tensors in ranks if name in tensors]
        if ignored_as(name, "mindspore") or having[0].dtype not in WIDTH:
            whole.append(having[0])
            continue
        _require_alike(name, ranks)
        axis = _split_axis(name)
        if axis is not None and axis < len(having[0].shape):
            whole.append(glue(having, axis))
        else:
            _require_same(having)
            whole.append(having[0])
    return whole


def _with_joined(whole, others, sizes: TelechatSizes, ranges) -> Tensors:
    """``others`` with joined tensors, made of rows of ``whole``, in place of their parts."""
    _require_heads(sizes, "joining its rows (qkv_concat)")
    result = dict(others)
    for joined in JOINED:
        for layer in range(sizes.num_layers):
            parts = dict.fromkeys(part.format(i=layer) for part, _ in joined.parts)
            if not parts.keys() & whole.keys():  # experts
                continue
            dtypes = {whole[part].dtype: part for part in parts}
            if len(dtypes) > 1:
                listed = " but ".join(f"{part} is {dtype}" for dtype, part in dtypes.items())
                raise UsageError(f"{listed}; rows of different dtypes cannot be joined: convert them to one")
            pieces = [(whole[part], first, last) for part, first, last in ranges(joined, layer)]
            for part in parts:
                del result[part]
            name, count = joined.mindspore.format(i=layer), sum(last - first for _, first, last in pieces)
            result[name] = rows_of(pieces, name, (count, sizes.hidden_size))
    return result


def _part(
    tensor: StoredTensor, joined: Joined, layer: int, sizes: TelechatSizes, tensor_parallel: int
) -> list[StoredTensor]:
    _require_heads(sizes, f"taking {tensor.name} apart")
    places, place_now = {}, 0  # of each part, where its row ranges lie in the joined tensor
    for rank in range(tensor_parallel):
        for part, first, last in _ranges(joined, layer, sizes, tensor_parallel, rank):
            places.setdefault(part, []).append((first, place_now, place_now + last - first))
            place_now += last - first
    expected = (place_now, sizes.hidden_size)
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
    head_dim = sizes.hidden_size // sizes.num_heads
    ranges = []
    for part, which in joined.parts:
        row = next(row for row in ROWS if row.mindspore == part)
        count = dims[row.shape[0]] // tensor_parallel
        name, start = part.format(i=layer), rank * count
        if which == "all":
            ranges.append((name, start, start + count))
            continue
        offset = 0 if which == "keys" else head_dim
        firsts = range(start + offset, start + count, 2 * head_dim)
        ranges += [(name, first, first + head_dim) for first in firsts]
    return ranges


def _split_axis(name: str) -> int | None:
    if is_joined([name]):
        return 0
    return next((row.split for row in ROWS if place(name, row, "mindspore")), None)


def _require_heads(sizes: TelechatSizes, doing: str) -> None:
    if sizes.num_heads is None or sizes.n_kv_heads is None:
        raise UsageError(
            f"{doing} needs the number of heads, which the tensors do not show; put the model's config.json "
            "beside them, or give convert_weight.py --model_name, such as telechat_7B"
        )


def _require_alike(name: str, ranks: list[Mapping[str, StoredTensor]]) -> None:
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


def _require_same(tensors: list[StoredTensor]) -> None:
    first = b"".join(map(bytes, tensors[0].blocks()))
    for other in tensors[1:]:
        if b"".join(map(bytes, other.blocks())) != first:
            raise UsageError(
                f"{tensors[0].file} and {other.file} hold different values of {other.name}, of which every "
                "rank has a copy; the ranks are of different checkpoints, or not of a tensor-parallel group"
            )
