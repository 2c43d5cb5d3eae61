"""From the tensors of a checkpoint to a complete plan of its conversion, or to the list of what is wrong."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from research.telechat2.checkpoint.dtypes import WIDTH
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.stored import StoredTensor
from research.telechat2.checkpoint.table import (
    EMBEDDING,
    LM_HEAD,
    Side,
    canonical_name,
    expand,
    ignored_as,
    infer_sizes,
)

TIED_COPY = "lm_head.weight, equal to the embeddings it is tied to"


@dataclass(frozen=True)
class Plan:
    """Every weight of a checkpoint with its name on the other side; and what is left out, counted by kind."""

    sizes: TelechatSizes
    weights: list[tuple[StoredTensor, str]]
    ignored: dict[str, int]


def make_plan(tensors: list[StoredTensor], side: Side, sizes: TelechatSizes | None, origin: str) -> Plan:
    """Match tensors spelled as on ``side`` with the table.

    ``sizes`` None takes the sizes from the tensors; ``origin`` is what error messages call the checkpoint.

    Raises:
        ValueError: tensors that are unknown, missing, twice there, misshapen or not floating point (the
            first ten of each are listed), or a tied model whose ``lm_head`` is not its embedding.
    """
    found: dict[str, StoredTensor] = {}
    duplicate, ignored = [], Counter()
    for tensor in tensors:
        name = canonical_name(tensor.name, side)
        if kind := ignored_as(tensor.name, side):
            ignored[kind] += 1
        elif name in found:
            duplicate.append(f"{name} (in {found[name].file.name} and {tensor.file.name})")
        else:
            found[name] = tensor
    sizes = _settle_sizes(found, side, sizes, origin)
    if sizes.tie_word_embeddings and (head := found.pop(getattr(LM_HEAD, side), None)):
        _require_same(head, found.get(getattr(EMBEDDING, side)), origin)
        ignored[TIED_COPY] += 1
    other: Side = "mindspore" if side == "torch" else "torch"
    expected = {getattr(weight, side): weight for weight in expand(sizes)}
    if expected.keys() & found.keys() <= {getattr(LM_HEAD, side)}:  # the one name that both sides share
        infer_sizes({name: tensor.shape for name, tensor in found.items()}, side)  # says what was expected
    problems = {
        "unknown": [name for name in found if name not in expected],
        "missing": [name for name in expected if name not in found],
        "duplicate": duplicate,
        "misshapen": [
            f"{name} {list(tensor.shape)}, expected {list(expected[name].shape)}"
            for name, tensor in found.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
        "non-floating-point": [
            f"{name} ({tensor.dtype})" for name, tensor in found.items() if tensor.dtype not in WIDTH
        ],
    }
    if any(problems.values()):
        raise ValueError(_report(problems, sizes, origin))
    weights = [(tensor, getattr(expected[name], other)) for name, tensor in found.items()]
    return Plan(sizes, weights, dict(ignored))


def _settle_sizes(
    found: dict[str, StoredTensor], side: Side, sizes: TelechatSizes | None, origin: str
) -> TelechatSizes:
    if not found:
        raise ValueError(f"{origin} holds no weights; expected those of a TeleChat model")
    if sizes is None:
        return infer_sizes({name: tensor.shape for name, tensor in found.items()}, side)
    if sizes.num_layers > len(found):
        raise ValueError(
            f"the config says {sizes.num_layers} layers, but {origin} holds only {len(found)} tensors; "
            "the config or the weights belong to another model, or files are missing"
        )
    if sizes.tie_word_embeddings is None:
        return dataclasses.replace(sizes, tie_word_embeddings=getattr(LM_HEAD, side) not in found)
    return sizes


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
    lines = [
        f"{origin} is not a dense TeleChat checkpoint of {sizes.num_layers} layers, hidden size "
        f"{sizes.hidden_size}, feed-forward size {sizes.intermediate_size}, vocabulary {sizes.vocab_size}. "
        "Tensors that are"
    ]
    for kind, names in problems.items():
        if names:
            shown = [name if name.isprintable() else ascii(name) for name in names[:10]]
            more = f", … and {len(names) - 10} more" if len(names) > 10 else ""
            lines.append(f"  {len(names)} {kind}: {', '.join(shown)}{more}")
    return "\n".join(lines)
