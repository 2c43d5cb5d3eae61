"""The names and layout of Llama's weights beside those of TeleChat's torch form, in either direction.

TeleChat packs K and V in ``key_value``, per head one after the other; Llama has two tensors. Query rows,
the order of channels within a head and everything else are the same. TeleChat has biases on ``dense`` and
``down_proj`` alone, Llama on all projections of a block or on none.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from research.telechat2.checkpoint.plan import differences, refuse_differences
from research.telechat2.checkpoint.release.description import Description
from research.telechat2.checkpoint.storage.tensor import Shape, StoredTensor, Weights, zeros
from research.telechat2.checkpoint.storage.views import cut, join
from research.telechat2.checkpoint.table import expand
from research.telechat2.common.errors import UsageError

TOP = {
    "model.embed_tokens.weight": "transformer.word_embeddings.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER = {  # within model.layers.{i} and transformer.h.{i}
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.q_proj.weight": "self_attention.query.weight",
    "self_attn.o_proj.weight": "self_attention.dense.weight",
    "self_attn.o_proj.bias": "self_attention.dense.bias",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
    "mlp.down_proj.bias": "mlp.down_proj.bias",
}
KEY, VALUE, KEY_VALUE = "self_attn.k_proj", "self_attn.v_proj", "self_attention.key_value.weight"
OUT_BIAS, DOWN_BIAS = "self_attn.o_proj.bias", "mlp.down_proj.bias"
# The biases that TeleChat lacks.
ATTENTION_ZEROS = ("self_attn.q_proj.bias", f"{KEY}.bias", f"{VALUE}.bias")
MLP_ZEROS = ("mlp.gate_proj.bias", "mlp.up_proj.bias")
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_TELECHAT_LAYER = re.compile(r"transformer\.h\.([0-9]+)\.(.+)")


@dataclass(frozen=True)
class Imported:
    """Llama's weights under TeleChat's torch names, the tensors they are made of, and what is left out."""

    tensors: list[StoredTensor]
    sources: dict[str, StoredTensor]
    ignored: dict[str, int]


def to_llama(weights: Weights, description: Description) -> Weights:
    """TeleChat's weights, under its torch names, as Llama's, in the same order.

    Without ``attention_bias`` or ``mlp_bias`` no bias of such a block is written: those of TeleChat must then
    be zero (``with_needed_biases``). With them, those that TeleChat lacks are zeros.
    """
    of_top = {telechat: llama for llama, telechat in TOP.items()}
    result: Weights = []
    for tensor, name in weights:
        if match := _TELECHAT_LAYER.fullmatch(name):
            parts = _layer_to_llama(tensor, match[2], description)
            result += [(part, f"model.layers.{match[1]}.{llama}") for part, llama in parts]
        else:
            result.append((tensor, of_top[name]))
    return result


def _layer_to_llama(tensor: StoredTensor, telechat: str, description: Description) -> Weights:
    absent = _absent_biases(description)
    if telechat == KEY_VALUE:
        parts = [
            (_every_other_head(tensor, description, which), name) for which, name in enumerate((KEY, VALUE))
        ]
    else:
        llama = next(llama for llama, name in LAYER.items() if name == telechat)
        if llama in absent:
            return []
        if llama.removesuffix(".weight") + ".bias" not in (*ATTENTION_ZEROS, *MLP_ZEROS):
            return [(tensor, llama)]
        parts = [(tensor, llama.removesuffix(".weight"))]
    result = []
    for part, name in parts:
        result.append((part, f"{name}.weight"))
        if f"{name}.bias" not in absent:
            result.append((zeros(f"{name}.bias", part.dtype, part.shape[:1]), f"{name}.bias"))
    return result


def _absent_biases(description: Description) -> tuple[str, ...]:
    attention = () if description.attention_bias else (*ATTENTION_ZEROS, OUT_BIAS)
    return attention + (() if description.mlp_bias else (*MLP_ZEROS, DOWN_BIAS))


def _every_other_head(key_value: StoredTensor, description: Description, first: int) -> StoredTensor:
    """K (``first`` 0) or V (1) of packed rows."""
    heads, dim, hidden = description.sizes.kv_heads, description.sizes.head_dim, key_value.shape[1]
    parts = cut(key_value, [(dim, hidden)] * (2 * heads))[first::2]
    return join(parts, f"{key_value.name}[{'kv'[first]}]", (heads * dim, hidden))


def with_needed_biases(weights: Weights, description: Description) -> Description:
    """``description`` with the biases that a Llama has to have for these weights of TeleChat.

    An imported model without biases gets zeros, and may be trained from there: if one is not zero any more,
    all are written.
    """

    def nonzero(name: str) -> bool:
        return any(not tensor.is_zero() for tensor, full in weights if full.endswith(name))

    return replace(
        description,
        attention_bias=description.attention_bias or nonzero(LAYER[OUT_BIAS]),
        mlp_bias=description.mlp_bias or nonzero(LAYER[DOWN_BIAS]),
    )


def from_llama(tensors: list[StoredTensor], description: Description, origin: str) -> Imported:
    """Llama's weights under TeleChat's torch names; ``origin`` is what messages call the checkpoint.

    Raises:
        UsageError: tensors that are unknown, missing, there twice, misshapen or no weights (the first ten of
            each are listed), K and V of different dtypes, or a bias that TeleChat lacks and is not zero.
    """
    found: dict[str, StoredTensor] = {}
    ignored: Counter[str] = Counter()
    twice: list[str] = []
    for tensor in tensors:
        if _ROTARY.fullmatch(tensor.name):
            ignored["rotary buffers"] += 1
        elif tensor.name in found:
            twice.append(tensor.name)
        else:
            found[tensor.name] = tensor
    _check(found, twice, description, origin)
    for name in [name for name in found if name.endswith((*ATTENTION_ZEROS, *MLP_ZEROS))]:
        if not found[name].is_zero():
            raise UsageError(
                f"{name} in {origin} is not zero; TeleChat's layers have biases on the output and down "
                "projections alone, so this model cannot be expressed"
            )
        ignored["all-zero biases of q, k, v, gate and up projections"] += 1
        del found[name]
    return Imported(list(_to_telechat(found, description)), found, dict(ignored))


def _to_telechat(found: dict[str, StoredTensor], description: Description) -> Iterator[StoredTensor]:
    for llama, telechat in TOP.items():
        if llama in found:
            yield replace(found[llama], name=telechat)
    for layer in range(description.sizes.num_layers):
        here, there = f"model.layers.{layer}", f"transformer.h.{layer}"
        for llama, telechat in LAYER.items():
            tensor = found.get(f"{here}.{llama}")
            if tensor is None:  # a bias
                weight = found[f"{here}.{llama.removesuffix('bias')}weight"]
                tensor = zeros(telechat, weight.dtype, (description.sizes.hidden_size,))
            yield replace(tensor, name=f"{there}.{telechat}")
        key, value = found[f"{here}.{KEY}.weight"], found[f"{here}.{VALUE}.weight"]
        yield _packed(key, value, f"{there}.{KEY_VALUE}", description)


def _packed(key: StoredTensor, value: StoredTensor, name: str, description: Description) -> StoredTensor:
    if key.dtype != value.dtype:
        raise UsageError(
            f"{key.name} is {key.dtype}, but {value.name} is {value.dtype}; TeleChat packs both in one "
            "tensor: save them in one dtype"
        )
    heads = description.sizes.kv_heads
    rows = [(description.sizes.head_dim, key.shape[1])] * heads
    pairs = zip(cut(key, rows), cut(value, rows), strict=True)
    return join([part for pair in pairs for part in pair], name, (2 * key.shape[0], key.shape[1]))


def expected_shapes(description: Description) -> dict[str, Shape]:
    """Name -> shape of every tensor of the Llama model: what the table's weights become."""
    sizes = replace(description.sizes, tie_word_embeddings=False)
    table = [
        (zeros(name, "float32", shape), name)
        for weight in expand(sizes)
        for name, shape in weight.torch.items()
    ]
    return {name: tensor.shape for tensor, name in to_llama(table, description)}


def _check(found: dict[str, StoredTensor], twice: list[str], description: Description, origin: str) -> None:
    sizes = description.sizes
    if sizes.num_layers > len(found):  # do not build a table of that length
        raise UsageError(
            f"the config says {sizes.num_layers} layers, but {origin} holds only {len(found)} tensors; the "
            "config or the weights belong to another model, or files are missing"
        )
    expected = expected_shapes(description)
    if sizes.tie_word_embeddings and "lm_head.weight" not in found:
        del expected["lm_head.weight"]
    problems = differences(found, expected) | {"there twice": twice}
    what = f"{origin} is not the Llama checkpoint that its config describes: {sizes.describe()}"
    refuse_differences(problems, what)
