"""What can be wrong with the experts of a checkpoint, said by layer and expert."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from research.telechat2.checkpoint.stored import StoredTensor
from research.telechat2.checkpoint.table import ATTENTION_ROWS, MOE_ROWS, Side, Weight, place

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
        ValueError: with the tensor that shows it.
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
                raise ValueError(
                    f"{name} {list(tensor.shape)} is transposed, expected [{', '.join(row.stacked)}]: "
                    "this is the layout that convert_gmm.py writes for inference with grouped matmul. "
                    "Give the checkpoint that convert_gmm.py was given, or swap the last two axes of every "
                    "feed_forward.ffn.w1, w2 and w3 weight"
                )
