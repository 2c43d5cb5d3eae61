"""From the tensors of a checkpoint to a complete plan of its conversion, or to the list of what is wrong."""

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass

from research.telechat2.checkpoint.dtypes import NOT_READ, WIDTH
from research.telechat2.checkpoint.experts import (
    expert_of,
    missing_in_words,
    mixed_dtypes,
    refuse_transposed,
)
from research.telechat2.checkpoint.inferring import count_experts, infer_sizes
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.stored import StoredTensor, cut, join
from research.telechat2.checkpoint.table import (
    EMBEDDING,
    LM_HEAD,
    ROUTER_BIASES,
    Side,
    Weight,
    canonical_name,
    expand,
    ignored_as,
)

TIED_COPY = "lm_head.weight, equal to the embeddings it is tied to"


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
        ValueError: tensors that are unknown, missing, twice there, misshapen or not floating point (the
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
        raise ValueError(_report(problems, sizes, origin))
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
        raise ValueError(f"{origin} holds no weights; expected those of a TeleChat model")
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if sizes is None:
        return infer_sizes(shapes, side)
    if sizes.num_layers > len(found):
        raise ValueError(
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
        raise ValueError(
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
        raise ValueError(
            f"{tensor.name} is not zero: this checkpoint's router adds a bias before it chooses experts, "
            "which the TeleChat2 models do not have, and without it other experts would be chosen. Give a "
            "checkpoint trained without balance_via_topk_bias"
        )


def _require_same(head: StoredTensor, embedding: StoredTensor | None, origin: str) -> None:
    if embedding is None:
        return  # reported as missing with the rest
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same or any(bytes(a) != bytes(b) for a, b in zip(head.blocks(), embedding.blocks(), strict=True)):
        raise ValueError(
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
