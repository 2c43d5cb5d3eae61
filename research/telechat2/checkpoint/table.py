"""The one table of weights: which TeleChat (torch) tensor is which MindSpore parameter, and of what shape.

Both converters, and every loader, work from these rows, in either direction. ``{i}`` is the layer. Shapes
are written in the symbols of :meth:`TelechatSizes.dims`. ``key_value`` and ``wk_v`` hold the same rows in the
same order, K then V per kv head, so that nothing but names changes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from research.telechat2.checkpoint.sizes import TelechatSizes

Side = Literal["torch", "mindspore"]


@dataclass(frozen=True)
class Row:
    """One tensor in its two spellings; with ``{i}`` in them, one for each layer."""

    torch: str
    mindspore: str
    shape: tuple[str, ...]


def _layer_row(torch: str, mindspore: str, *shape: str) -> Row:
    return Row(f"transformer.h.{{i}}.{torch}", f"model.layers.{{i}}.{mindspore}", shape)


LM_HEAD = Row("lm_head.weight", "lm_head.weight", ("vocab", "hidden"))  # absent when embeddings are tied
EMBEDDING = Row(
    "transformer.word_embeddings.weight", "model.tok_embeddings.embedding_weight", ("vocab", "hidden")
)
ROWS = (
    EMBEDDING,
    _layer_row("input_layernorm.weight", "attention_norm.weight", "hidden"),
    _layer_row("self_attention.query.weight", "attention.wq.weight", "hidden", "hidden"),
    _layer_row("self_attention.key_value.weight", "attention.wk_v.weight", "key_value", "hidden"),
    _layer_row("self_attention.dense.weight", "attention.wo.weight", "hidden", "hidden"),
    _layer_row("self_attention.dense.bias", "attention.wo.bias", "hidden"),
    _layer_row("post_attention_layernorm.weight", "ffn_norm.weight", "hidden"),
    _layer_row("mlp.gate_proj.weight", "feed_forward.w1.weight", "ffn", "hidden"),
    _layer_row("mlp.up_proj.weight", "feed_forward.w3.weight", "ffn", "hidden"),
    _layer_row("mlp.down_proj.weight", "feed_forward.w2.weight", "hidden", "ffn"),
    _layer_row("mlp.down_proj.bias", "feed_forward.w2.bias", "hidden"),
    Row("transformer.ln_f.weight", "model.norm_out.weight", ("hidden",)),
    LM_HEAD,
)

# What a checkpoint may hold beside weights: left out of the other side, and counted under these words.
_STATE_PER_WEIGHT = (
    "accu_grads|adam_[mv]|exp_avg|(max_)?exp_avg_sq|exp_avg_(sq|insta)_(row|col)|exp_inf|lamb_[mv]|moment[12s]?|"
    "muon_m|pma_weight_[a-z]+|vhat|accum(_update)?|mean_(grad|square)|stat|prev|step_size"
)
IGNORED: dict[Side, dict[str, re.Pattern]] = {
    "torch": {"rotary buffers": re.compile(r".*rotary\w*\.(inv_freq|cos_cached|sin_cached)")},
    "mindspore": {
        "optimizer states": re.compile(rf"({_STATE_PER_WEIGHT})[._](model\.|lm_head\.).*"),
        "training counters and scalars": re.compile(
            r"epoch_num|step_num|global_step|(afactor|(current|last_overflow)_iterator)_step|global_batch_size|"
            r"loss_scale|scale_sense|learning_rate\w*|momentum|beta[12]_power|graceful_(exit|init)|"
            r"_device_local_\w+"
        ),
        "key/value caches": re.compile(r".*\.(key|value)_cache"),
    },
}


@dataclass(frozen=True)
class Weight:
    """One tensor of a model of known sizes: a row with its layer and its shape filled in."""

    torch: str
    mindspore: str
    shape: tuple[int, ...]


def expand(sizes: TelechatSizes) -> list[Weight]:
    """Every weight of a model, in the order of its layers; without ``lm_head`` when embeddings are tied."""
    rows = ROWS[:-1] if sizes.tie_word_embeddings else ROWS
    dims = sizes.dims()
    weights = []
    for layered, group in groupby(rows, key=lambda row: "{i}" in row.torch):
        same = list(group)
        for layer in range(sizes.num_layers) if layered else (None,):
            weights += [_fill(row, dims, layer) for row in same]
    return weights


def _fill(row: Row, dims: Mapping[str, int], layer: int | None = None) -> Weight:
    shape = tuple(dims[symbol] for symbol in row.shape)
    return Weight(row.torch.format(i=layer), row.mindspore.format(i=layer), shape)


def canonical_name(name: str, side: Side) -> str:
    """The table's spelling of a tensor's name: TeleChat v1 7B leaves ``transformer.`` out."""
    if side == "torch" and re.match(r"(h\.[0-9]+|word_embeddings|ln_f)\.", name):
        return f"transformer.{name}"
    return name


def ignored_as(name: str, side: Side) -> str | None:
    """What kind of non-weight a tensor is (a key of ``IGNORED``), None when it is not one."""
    return next((what for what, pattern in IGNORED[side].items() if pattern.fullmatch(name)), None)


def infer_sizes(shapes: Mapping[str, tuple[int, ...]], side: Side) -> TelechatSizes:
    """Sizes from the tensors alone (canonical name -> shape), by the first of each row that is there.

    Raises:
        ValueError: a size shows in no tensor, so this is no TeleChat checkpoint.
    """
    layers = _layer_indices(shapes, side)
    dims: dict[str, int] = {}
    for row in ROWS:
        name = getattr(row, side).format(i=min(layers, default=0))
        shape = shapes.get(name, ())
        if len(shape) == len(row.shape):
            for symbol, size in zip(row.shape, shape, strict=True):
                if size:
                    dims.setdefault(symbol, size)
    absent = [symbol for symbol in ("vocab", "hidden", "ffn", "key_value") if symbol not in dims]
    if absent or not layers:
        raise ValueError(
            f"this is no dense TeleChat checkpoint: none of its {len(shapes)} tensors shows the size of "
            f"{', '.join(absent) or 'a layer'}. Its first names are {sorted(shapes)[:5]}, expected names "
            f"such as {getattr(ROWS[3], side).format(i=0)}"
        )
    return TelechatSizes(
        # A layer number beyond the number of tensors is a broken name: do not build a table of that length.
        num_layers=min(max(layers) + 1, len(shapes)),
        hidden_size=dims["hidden"],
        intermediate_size=dims["ffn"],
        vocab_size=dims["vocab"],
        kv_size=dims["key_value"] // 2,
        tie_word_embeddings=getattr(LM_HEAD, side) not in shapes,
    )


def _layer_indices(names: Iterable[str], side: Side) -> set[int]:
    prefix = getattr(ROWS[1], side).partition("{i}")[0]
    matches = (re.match(re.escape(prefix) + r"([0-9]{1,9})\.", name) for name in names)
    return {int(match[1]) for match in matches if match}
