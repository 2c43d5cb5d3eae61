"""From the tensors of a checkpoint to a complete plan of its conversion, or to the list of what is wrong."""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from statistics import mode

from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.storage.dtypes import NOT_READ, WIDTH
from research.telechat2.checkpoint.storage.tensor import StoredTensor, cut, join
from research.telechat2.checkpoint.table import (
    ATTENTION_ROWS,
    DENSE_ROWS,
    EMBEDDING,
    LM_HEAD,
    MOE_ROWS,
    ROUTER_BIASES,
    ROWS,
    Side,
    Weight,
    canonical_name,
    expand,
    ignored_as,
    place,
)
from research.telechat2.common.errors import UsageError

TIED_COPY = "lm_head.weight, equal to the embeddings it is tied to"


Shapes = Mapping[str, tuple[int, ...]]  # by canonical name


EXPERT_ROWS = [row for row in MOE_ROWS if "{e}" in row.torch]


def expert_of(name: str) -> tuple[int, int] | None:
    """The (layer, expert) that a torch tensor belongs to; None where it belongs to no expert."""
    return next((found for row in EXPERT_ROWS if (found := place(name, row, "torch"))), None)


def missing_in_words(names: Iterable[str]) -> list[str]:
    """Names of missing tensors, with layer and expert for those of experts, all of an expert's in one."""
    by_expert = defaultdict(list)
    for name in names:
        by_expert[expert_of(name) or name].append(name)
    words = []
    for key, tensors in by_expert.items():
        if isinstance(key, str):
            words.append(key)
            continue
        layer, expert = key
        leaves = [name.partition(f".local_experts.{expert}.")[2] for name in tensors]
        whole = len(leaves) == len(EXPERT_ROWS)
        words.append(("" if whole else f"{' and '.join(leaves)} of ") + f"layer {layer}'s expert {expert}")
    return words


def mixed_dtypes(weights: Iterable[Weight], found: Mapping[str, StoredTensor]) -> list[str]:
    """The stacks whose torch tensors are not all of one dtype, in words."""
    words = []
    for weight in weights:
        first_of = {found[name].dtype: name for name in reversed(weight.torch) if name in found}
        if len(first_of) > 1:
            words.append(" but ".join(f"{name} is {dtype}" for dtype, name in sorted(first_of.items())))
    return words


def refuse_transposed(found: Mapping[str, StoredTensor], side: Side) -> None:
    """Refuse stacks of experts in the layout of grouped matmul, [experts, in, out].

    Where hidden size and feed-forward size are equal the two layouts look the same, and pass.

    Raises:
        UsageError: with the tensor that shows it.
    """
    norm = next((name for name in found if place(name, ATTENTION_ROWS[0], side)), None)
    if side == "torch" or norm is None:
        return
    for row in (row for row in EXPERT_ROWS if len(row.stacked) == 3):
        axis = row.stacked.index("hidden")  # 1 or 2
        for name, tensor in found.items():
            if not place(name, row, side) or len(tensor.shape) != 3:
                continue
            if tensor.shape[3 - axis] == found[norm].size != tensor.shape[axis]:
                raise UsageError(
                    f"{name} {list(tensor.shape)} is transposed, expected [{', '.join(row.stacked)}]: "
                    "this is the layout that convert_gmm.py writes for inference with grouped matmul. "
                    "Give the checkpoint that convert_gmm.py was given, or swap the last two axes of every "
                    "feed_forward.ffn.w1, w2 and w3 weight"
                )


def infer_sizes(shapes: Shapes, side: Side) -> TelechatSizes:
    """Sizes by the first tensor of each row that is there.

    Raises:
        UsageError: a size shows in no tensor, so this is no TeleChat checkpoint; or as ``count_experts``.
    """
    layers = _layer_indices(shapes, side)
    expert = min(_expert_indices(shapes, side), default=0)
    dims: dict[str, int] = {}
    for row in ROWS:
        name = getattr(row, side).format(i=min(layers, default=0), e=expert)
        symbols, shape = row.shape_on(side), shapes.get(name, ())
        if len(shape) == len(symbols):
            for symbol, size in zip(symbols, shape, strict=True):
                if size:
                    dims.setdefault(symbol, size)
    absent = [symbol for symbol in ("vocab", "hidden", "ffn", "key_value") if symbol not in dims]
    if absent or not layers:
        raise UsageError(
            f"this is no TeleChat checkpoint: none of its {len(shapes)} tensors shows the size of "
            f"{', '.join(absent) or 'a layer'}. Its first names are {sorted(shapes)[:5]}, expected names "
            f"such as {getattr(ATTENTION_ROWS[2], side).format(i=0)}"
        )
    return TelechatSizes(
        # A layer number beyond the number of tensors is a broken name: do not build a table of that length.
        num_layers=min(max(layers) + 1, len(shapes)),
        hidden_size=dims["hidden"],
        intermediate_size=dims["ffn"],
        vocab_size=dims["vocab"],
        kv_size=dims["key_value"] // 2,
        tie_word_embeddings=getattr(LM_HEAD, side) not in shapes,
        num_experts=count_experts(shapes, side) or 0,
    )


def count_experts(shapes: Shapes, side: Side) -> int | None:
    """The number of experts of every layer, 0 in a dense model; None where nothing shows which it is.

    It is the leading axis of the routers and stacks (what most of them say), or else the number of different
    expert numbers.

    Raises:
        UsageError: some layers are dense and some have experts, or there are more experts than tensors.
    """
    dense, moe = (_first_of(shapes, rows, side) for rows in (DENSE_ROWS, MOE_ROWS))
    if dense and moe:
        raise UsageError(
            f"some of these tensors are of a dense model ({dense}) and some of a mixture of experts ({moe}); "
            "every layer of a TeleChat model is of the same kind. Give the files of one checkpoint"
        )
    if not moe:
        return 0 if dense else None
    counts = [
        shape[row.shape_on(side).index("experts")]
        for row in MOE_ROWS
        if "experts" in row.shape_on(side)
        for name, shape in shapes.items()
        if place(name, row, side) and len(shape) == len(row.shape_on(side)) and prod(shape)
    ]
    count = mode(counts) if counts else len(_expert_indices(shapes, side))
    if side == "torch" and count > len(shapes):  # do not build a table of that length
        raise UsageError(
            f"the routers have rows for {count} experts, but there are only {len(shapes)} tensors; every "
            "expert has four in each layer. Files are missing, or the checkpoint is broken"
        )
    return count


def _first_of(shapes: Shapes, rows, side: Side) -> str | None:
    return next((name for name in shapes if any(place(name, row, side) for row in rows)), None)


def _layer_indices(names: Iterable[str], side: Side) -> set[int]:
    prefix = getattr(ATTENTION_ROWS[0], side).partition("{i}")[0]
    matches = (re.match(re.escape(prefix) + r"([0-9]{1,9})\.", name) for name in names)
    return {int(match[1]) for match in matches if match}


def _expert_indices(names: Iterable[str], side: Side) -> set[int]:
    rows = [row for row in MOE_ROWS if "{e}" in getattr(row, side)]
    places = (place(name, row, side) for name in names for row in rows)
    return {found[1] for found in places if found}


@dataclass(frozen=True)
class Plan:
    """What is in a checkpoint, and what becomes of it.

    ``sources``: its weights as they are; ``weights``: those of the other side with their names there, made of
    the same bytes; ``ignored``: what is left out, counted by kind.
    """

    sizes: TelechatSizes
    sources: list[StoredTensor]
    weights: list[tuple[StoredTensor, str]]
    ignored: dict[str, int]


def make_plan(tensors: list[StoredTensor], side: Side, sizes: TelechatSizes | None, origin: str) -> Plan:
    """Match tensors spelled as on ``side`` with the table.

    ``sizes`` None takes the sizes from the tensors; ``origin`` is what error messages call the checkpoint.

    Raises:
        UsageError: tensors that are unknown, missing, twice there, misshapen or not floating point (the
            first ten of each are listed), experts that do not make a stack, or a tied model whose
            ``lm_head`` is not its embedding.
    """
    found: dict[str, StoredTensor] = {}
    duplicate, ignored = [], Counter()
    for tensor in tensors:
        name = canonical_name(tensor.name, side)
        if kind := ignored_as(tensor.name, side):
            if kind == ROUTER_BIASES:
                _require_zero(tensor)
            ignored[kind] += 1
        elif name in found:
            duplicate.append(f"{name} (in {found[name].file.name} and {tensor.file.name})")
        else:
            found[name] = tensor
    refuse_transposed(found, side)
    sizes = _settle_sizes(found, side, sizes, origin)
    if sizes.tie_word_embeddings and (head := found.pop(getattr(LM_HEAD, side), None)):
        _require_same(head, found.get(getattr(EMBEDDING, side)), origin)
        ignored[TIED_COPY] += 1
    weights = expand(sizes)
    expected = {name: shape for weight in weights for name, shape in weight.shapes_on(side).items()}
    problems = _problems(found, expected, side, sizes)
    problems["duplicate"] = duplicate
    if side == "torch":
        problems["to be stacked, but of different dtypes (save them in one)"] = mixed_dtypes(weights, found)
    if any(problems.values()):
        raise UsageError(_report(problems, sizes, origin))
    translate = _to_mindspore if side == "torch" else _to_torch
    return Plan(sizes, list(found.values()), translate(found, weights), dict(ignored))


def _to_mindspore(found: dict[str, StoredTensor], weights: list[Weight]) -> list[tuple[StoredTensor, str]]:
    """The parameters, in the order in which the first torch tensor of each was found."""
    weight_of = {name: weight for weight in weights for name in weight.torch}
    ordered = {weight_of[name].mindspore: weight_of[name] for name in found}
    return [
        (join([found[part] for part in weight.torch], name, weight.shape), name)
        for name, weight in ordered.items()
    ]


def _to_torch(found: dict[str, StoredTensor], weights: list[Weight]) -> list[tuple[StoredTensor, str]]:
    parts_of = {weight.mindspore: weight.torch for weight in weights}
    return [
        (part, torch_name)
        for name, tensor in found.items()
        for part, torch_name in zip(cut(tensor, list(parts_of[name].values())), parts_of[name], strict=True)
    ]


def _settle_sizes(
    found: dict[str, StoredTensor], side: Side, sizes: TelechatSizes | None, origin: str
) -> TelechatSizes:
    if not found:
        raise UsageError(f"{origin} holds no weights; expected those of a TeleChat model")
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if sizes is None:
        return infer_sizes(shapes, side)
    if sizes.num_layers > len(found):
        raise UsageError(
            f"the config says {sizes.num_layers} layers, but {origin} holds only {len(found)} tensors; "
            "the config or the weights belong to another model, or files are missing"
        )
    shown = count_experts(shapes, side)
    if shown is None:  # another model, or the names of the other side
        infer_sizes(shapes, side)  # says what was expected
    if sizes.num_experts is None:
        sizes = dataclasses.replace(sizes, num_experts=shown)
    if sizes.num_experts != shown:
        said, held = (f"{n} experts" if n else "a dense model" for n in (sizes.num_experts, shown))
        raise UsageError(
            f"the config says {said}, but the weights in {origin} are those of {held}; the config or the "
            "weights belong to another model"
        )
    if sizes.tie_word_embeddings is None:
        return dataclasses.replace(sizes, tie_word_embeddings=getattr(LM_HEAD, side) not in found)
    return sizes


def _problems(
    found: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], side: Side, sizes: TelechatSizes
) -> dict[str, list[str]]:
    """Kind of problem -> what has it, in words."""
    unknown = [name for name in found if name not in expected]
    strange = [f"{name} ({tensor.dtype})" for name, tensor in found.items() if tensor.dtype not in WIDTH]
    beyond = []
    if side == "torch" and sizes.num_experts:
        beyond = [name for name in unknown if (place := expert_of(name)) and place[1] >= sizes.num_experts]
    return {
        "unknown": [name for name in unknown if name not in beyond],
        f"beyond the {sizes.num_experts} experts, 0 to {(sizes.num_experts or 0) - 1}": beyond,
        "missing": missing_in_words(name for name in expected if name not in found),
        "misshapen": [
            f"{name} {list(tensor.shape)}, expected {list(expected[name])}"
            for name, tensor in found.items()
            if name in expected and tensor.shape != expected[name]
        ],
        "non-floating-point": [text for text in strange if not _is_float(text)],
        "floating-point of a type that is not read": [text for text in strange if _is_float(text)],
    }


def _is_float(text: str) -> bool:
    return re.search(r"\((F|float)\d[^()]*\)$", text) is not None


def _require_zero(tensor: StoredTensor) -> None:
    if any(any(block) for block in tensor.blocks()):
        raise UsageError(
            f"{tensor.name} is not zero: this checkpoint's router adds a bias before it chooses experts, "
            "which the TeleChat2 models do not have, and without it other experts would be chosen. Give a "
            "checkpoint trained without balance_via_topk_bias"
        )


def _require_same(head: StoredTensor, embedding: StoredTensor | None, origin: str) -> None:
    if embedding is None:
        return  # reported as missing with the rest
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same or any(bytes(a) != bytes(b) for a, b in zip(head.blocks(), embedding.blocks(), strict=True)):
        raise UsageError(
            f"the config of {origin} says tie_word_embeddings, but lm_head.weight differs from the "
            "embeddings: set tie_word_embeddings to false if it is a weight of its own"
        )


def _report(problems: dict[str, list[str]], sizes: TelechatSizes, origin: str) -> str:
    lines = [f"{origin} is not a TeleChat checkpoint of {sizes.describe()}. Tensors that are"]
    for kind, names in problems.items():
        if names:
            shown = [name if name.isprintable() else ascii(name) for name in names[:10]]
            more = f", … and {len(names) - 10} more" if len(names) > 10 else ""
            lines.append(f"  {len(names)} {kind}: {', '.join(shown)}{more}")
    if any(names for kind, names in problems.items() if "floating-point" in kind):
        lines.append(f"{NOT_READ[0].upper()}{NOT_READ[1:]}.")
    return "\n".join(lines)
