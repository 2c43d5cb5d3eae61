"""From the tensors of a checkpoint to a complete plan of its conversion, or to the list of what is wrong."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mode

from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.storage.dtypes import NOT_READ
from research.telechat2.checkpoint.storage.tensor import Shape, StoredTensor, Weights
from research.telechat2.checkpoint.storage.views import cut, join
from research.telechat2.checkpoint.table import (
    ATTENTION_ROWS,
    DENSE_ROWS,
    EMBEDDING,
    EXPERT_ROWS,
    LM_HEAD,
    MOE_ROWS,
    ROUTER_BIASES,
    ROWS,
    Place,
    Row,
    Side,
    Weight,
    canonical_name,
    expand,
    ignored_as,
    locate,
)
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError
from research.telechat2.common.tables import listed

TIED_COPY = "lm_head.weight, equal to the embeddings it is tied to"

Found = Mapping[str, StoredTensor]  # by canonical name
Places = Mapping[str, Place]  # of those names that the table has


@dataclass(frozen=True)
class Plan:
    """What is in a checkpoint, and what becomes of it.

    ``sources``: its weights as they are, spelled as on ``side``; ``weights``: those of the other side with
    their names there, made of the same bytes; ``ignored``: what is left out, counted by kind.
    """

    side: Side
    sizes: TelechatSizes
    sources: list[StoredTensor]
    weights: Weights
    ignored: dict[str, int]

    @property
    def named_sources(self) -> dict[str, StoredTensor]:
        """The sources by the table's spelling of their names."""
        return {canonical_name(tensor.name, self.side): tensor for tensor in self.sources}

    @property
    def parameters(self) -> dict[str, StoredTensor]:
        """The MindSpore side by name, whichever side the checkpoint is of."""
        if self.side == "torch":
            return {name: tensor for tensor, name in self.weights}
        return self.named_sources


def make_plan(tensors: Iterable[StoredTensor], side: Side, sizes: TelechatSizes | None, origin: str) -> Plan:
    """Match tensors spelled as on ``side`` with the table.

    ``sizes`` None takes the sizes from the tensors; ``origin`` is what error messages call the checkpoint.
    UsageError on tensors that are unknown, missing, twice there, misshapen or not floating point, experts
    that do not make a stack, or a tied model whose ``lm_head`` is not its embedding.
    """
    found: dict[str, StoredTensor] = {}
    duplicate: list[str] = []
    ignored: Counter[str] = Counter()
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
    if not found:
        raise UsageError(f"{origin} holds no weights; expected those of a TeleChat model")
    places = {name: place for name in found if (place := locate(name, side))}
    if side == "mindspore":
        _refuse_transposed(found, places)
    sizes = _settle_sizes(found, places, side, sizes, origin)
    if sizes.tie_word_embeddings and (head := found.pop(getattr(LM_HEAD, side), None)):
        _require_same(head, found.get(getattr(EMBEDDING, side)), origin)
        ignored[TIED_COPY] += 1
    weights = expand(sizes)
    expected = {name: shape for weight in weights for name, shape in weight.shapes_on(side).items()}
    problems = differences(found, expected)
    problems["duplicate"] = duplicate
    if side == "torch":
        experts = sizes.num_experts or 0
        expert_of = {name: place.expert for name, place in places.items() if place.expert is not None}
        beyond = [name for name in problems["unknown"] if expert_of.get(name, -1) >= experts > 0]
        problems["unknown"] = [name for name in problems["unknown"] if name not in beyond]
        problems[f"beyond the {experts} experts, 0 to {experts - 1}"] = beyond
        problems["to be stacked, but of different dtypes (save them in one)"] = _mixed_dtypes(weights, found)
    refuse_differences(problems, f"{origin} is not a TeleChat checkpoint of {sizes.describe()}")
    translate = _to_mindspore if side == "torch" else _to_torch
    return Plan(side, sizes, list(found.values()), translate(found, weights), dict(ignored))


def differences(found: Found, expected: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Kind of problem -> the tensors that have it, in words."""
    strange = [name for name in found if found[name].dtype not in WIDTH]
    floating = [name for name in strange if found[name].dtype.startswith(("F8", "float"))]
    return {
        "unknown": [name for name in found if name not in expected],
        "missing": _missing_in_words(name for name in expected if name not in found),
        "misshapen": [
            f"{name} {list(tensor.shape)}, expected {list(expected[name])}"
            for name, tensor in found.items()
            if name in expected and tensor.shape != expected[name]
        ],
        "non-floating-point": [f"{n} ({found[n].dtype})" for n in strange if n not in floating],
        "floating-point of a type that is not read": [f"{n} ({found[n].dtype})" for n in floating],
    }


def refuse_differences(problems: Mapping[str, list[str]], what: str) -> None:
    """Raise a UsageError that begins with ``what`` if there are any; it lists the first ten of a kind."""
    if not any(problems.values()):
        return
    lines = [f"{what}. Tensors that are"]
    lines += [f"  {len(words)} {kind}: {listed(words)}" for kind, words in problems.items() if words]
    if any(words for kind, words in problems.items() if "floating-point" in kind):
        lines.append(f"{NOT_READ[0].upper()}{NOT_READ[1:]}.")
    raise UsageError("\n".join(lines))


def _missing_in_words(names: Iterable[str]) -> list[str]:
    """Names of missing tensors, with layer and expert for those of experts, all of an expert's in one."""
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in names:
        place = locate(name, "torch")
        if place is None or place.expert is None:
            leaves[name] = []
        else:
            leaf = name.partition(f".local_experts.{place.expert}.")[2]
            leaves[f"layer {place.layer}'s expert {place.expert}"].append(leaf)
    plain = (0, len(EXPERT_ROWS))
    return [
        what if len(some) in plain else f"{' and '.join(some)} of {what}" for what, some in leaves.items()
    ]


def _mixed_dtypes(weights: Iterable[Weight], found: Found) -> list[str]:
    """The stacks whose torch tensors are not all of one dtype, in words."""
    words = []
    for weight in weights:
        first_of = {found[name].dtype: name for name in reversed(list(weight.torch)) if name in found}
        if len(first_of) > 1:
            words.append(" but ".join(f"{name} is {dtype}" for dtype, name in sorted(first_of.items())))
    return words


def _refuse_transposed(found: Found, places: Places) -> None:
    """Refuse stacks of experts in the layout of grouped matmul, [experts, in, out].

    Where hidden size and feed-forward size are equal the two layouts look the same, and pass.
    """
    hidden = next((found[name].size for name in places if places[name].row == ATTENTION_ROWS[0]), None)
    for name, place in places.items():
        stacked, shape = place.row.stacked, found[name].shape
        if len(stacked) != 3 or len(shape) != 3:
            continue
        axis = stacked.index("hidden")  # 1 or 2
        if shape[3 - axis] == hidden != shape[axis]:
            raise UsageError(
                f"{name} {list(shape)} is transposed, as convert_gmm.py writes it; expected "
                f"[{', '.join(stacked)}]. Give the checkpoint that convert_gmm.py was given"
            )


def _settle_sizes(
    found: Found, places: Places, side: Side, sizes: TelechatSizes | None, origin: str
) -> TelechatSizes:
    """``sizes`` of the config, completed by what the tensors show; without it all that they show."""
    if sizes is None:
        return _shown_sizes(found, places, side)
    if sizes.num_layers > len(found):
        raise UsageError(
            f"the config says {sizes.num_layers} layers, but {origin} holds only {len(found)} tensors; give "
            "all files of the model, and its own config"
        )
    shown = _count_experts(found, places, side)
    if shown is None:  # another model, or the names of the other side
        _shown_sizes(found, places, side)  # raises an error that names what was expected
    if sizes.num_experts is None:
        sizes = dataclasses.replace(sizes, num_experts=shown)
    if sizes.num_experts != shown:
        said, held = (f"{n} experts" if n else "a dense model" for n in (sizes.num_experts, shown))
        raise UsageError(
            f"the config says {said}, but the weights in {origin} are of {held}; give this model's config"
        )
    if sizes.tie_word_embeddings is None:
        return dataclasses.replace(sizes, tie_word_embeddings=getattr(LM_HEAD, side) not in found)
    return sizes


def _shown_sizes(found: Found, places: Places, side: Side) -> TelechatSizes:
    """Sizes by the first tensor of each row that is there; UsageError if one shows in no tensor."""
    first: dict[Row, str] = {}  # a row -> the tensor of its first layer and expert
    for name in sorted(places, key=lambda name: (places[name].layer or 0, places[name].expert or 0)):
        first.setdefault(places[name].row, name)
    dims: dict[str, int] = {}
    for row in (row for row in ROWS if row in first):
        symbols, shape = row.shape_on(side), found[first[row]].shape
        if len(shape) == len(symbols):
            for symbol, size in zip(symbols, shape, strict=True):
                if size:
                    dims.setdefault(symbol, size)
    layers = [place.layer for place in places.values() if place.layer is not None]
    absent = [symbol for symbol in ("vocab", "hidden", "ffn", "key_value") if symbol not in dims]
    if absent or not layers:
        raise UsageError(
            f"this is no TeleChat checkpoint: no tensor shows the size of {', '.join(absent) or 'a layer'}. "
            f"Of its {len(found)} names the first are {sorted(found)[:5]}, expected names such as "
            f"{getattr(ATTENTION_ROWS[2], side).format(i=0)}"
        )
    return TelechatSizes(
        # A layer number beyond the number of tensors is a broken name: do not build a table of that length.
        num_layers=min(max(layers) + 1, len(found)),
        hidden_size=dims["hidden"],
        intermediate_size=dims["ffn"],
        vocab_size=dims["vocab"],
        kv_size=dims["key_value"] // 2,
        tie_word_embeddings=getattr(LM_HEAD, side) not in found,
        num_experts=_count_experts(found, places, side) or 0,
    )


def _count_experts(found: Found, places: Places, side: Side) -> int | None:
    """The number of experts of every layer, 0 in a dense model; None where nothing shows which it is.

    It is the leading axis of the routers and stacks (what most of them say), or else the number of different
    expert numbers. UsageError if only some layers have experts, or there are more experts than tensors.
    """
    dense = next((name for name in places if places[name].row in DENSE_ROWS), None)
    moe = [name for name in places if places[name].row in MOE_ROWS]
    if dense and moe:
        raise UsageError(
            f"{dense} is of a dense model, {moe[0]} of a mixture of experts; expected layers of one kind. "
            "Give the files of one checkpoint"
        )
    if not moe:
        return 0 if dense else None
    counts = []
    for name in moe:
        symbols, tensor = places[name].row.shape_on(side), found[name]
        if "experts" in symbols and len(tensor.shape) == len(symbols) and tensor.size:
            counts.append(tensor.shape[symbols.index("experts")])
    count = mode(counts) if counts else len({places[name].expert for name in moe} - {None})
    if side == "torch" and count > len(found):  # do not build a table of that length
        raise UsageError(
            f"the routers have rows for {count} experts, but there are only {len(found)} tensors; expected "
            "four of each expert in each layer. Give all files of the checkpoint"
        )
    return count


def _to_mindspore(found: Found, weights: Sequence[Weight]) -> Weights:
    """The parameters, in the order in which the first torch tensor of each was found."""
    weight_of = {name: weight for weight in weights for name in weight.torch}
    ordered = {weight_of[name].mindspore: weight_of[name] for name in found}
    return [
        (join([found[part] for part in weight.torch], name, weight.shape), name)
        for name, weight in ordered.items()
    ]


def _to_torch(found: Found, weights: Sequence[Weight]) -> Weights:
    parts_of = {weight.mindspore: weight.torch for weight in weights}
    return [
        (part, torch_name)
        for name, tensor in found.items()
        for part, torch_name in zip(cut(tensor, list(parts_of[name].values())), parts_of[name], strict=True)
    ]


def _require_zero(tensor: StoredTensor) -> None:
    if not tensor.is_zero():
        raise UsageError(
            f"{tensor.name} is not zero, but TeleChat2's routers have no bias; give a checkpoint trained "
            "without balance_via_topk_bias"
        )


def _require_same(head: StoredTensor, embedding: StoredTensor | None, origin: str) -> None:
    if embedding is None:
        return  # reported as missing with the rest
    if head.kind != embedding.kind or head.checksum() != embedding.checksum():
        raise UsageError(
            f"the config of {origin} says tie_word_embeddings, but lm_head.weight is not the embeddings; set "
            "it to false if lm_head is a weight of its own"
        )
