"""The one table of weights: which TeleChat (torch) tensors are which MindSpore parameter, and of what shapes.

``{i}`` is the layer and ``{e}`` the expert; shapes are in the symbols of :meth:`TelechatSizes.dims`.
``key_value`` and ``wk_v`` hold the same rows, K then V per kv head, and MindSpore stacks the experts of a
layer along a leading axis: a parameter's bytes are those of its torch tensors, one after the other. Only what
inference joins (``JOINED``) has its rows in another order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

from research.telechat2.checkpoint.sizes import TelechatSizes

Side = Literal["torch", "mindspore"]
Rows = Literal[
    "all", "keys", "values"
]  # all of a parameter, or of each of its kv heads the keys or the values


@dataclass(frozen=True)
class Row:
    """One MindSpore parameter and its torch tensor, or with ``{e}`` its torch tensors, one for each expert.

    ``shape`` is that of a torch tensor, ``stacked`` that of the parameter where it is another. ``split`` is
    the axis of the parameter that the ranks of a tensor-parallel group share; None: each has all of it.
    """

    torch: str
    mindspore: str
    shape: tuple[str, ...]
    stacked: tuple[str, ...] = ()
    split: int | None = None

    def shape_on(self, side: Side) -> tuple[str, ...]:
        """The shape, in symbols, of a tensor of that side."""
        return self.stacked if side == "mindspore" and self.stacked else self.shape


def _layer_row(torch: str, mindspore: str, *shape: str, split: int | None = None) -> Row:
    return Row(f"transformer.h.{{i}}.{torch}", f"model.layers.{{i}}.{mindspore}", shape, split=split)


def _expert_row(leaf: str, parameter: str, *shape: str, split: int | None = None) -> Row:
    row = _layer_row(f"mlp.local_experts.{{e}}.{leaf}", f"feed_forward.ffn.{parameter}", *shape, split=split)
    return replace(row, stacked=("experts", *shape) if len(shape) > 1 else ("1", "experts", "1", *shape))


EMBEDDING = Row(
    "transformer.word_embeddings.weight",
    "model.tok_embeddings.embedding_weight",
    ("vocab", "hidden"),
    split=0,
)
ATTENTION_ROWS = (
    _layer_row("input_layernorm.weight", "attention_norm.weight", "hidden"),
    _layer_row("self_attention.query.weight", "attention.wq.weight", "hidden", "hidden", split=0),
    _layer_row("self_attention.key_value.weight", "attention.wk_v.weight", "key_value", "hidden", split=0),
    _layer_row("self_attention.dense.weight", "attention.wo.weight", "hidden", "hidden", split=1),
    _layer_row("self_attention.dense.bias", "attention.wo.bias", "hidden"),
    _layer_row("post_attention_layernorm.weight", "ffn_norm.weight", "hidden"),
)
DENSE_ROWS = (
    _layer_row("mlp.gate_proj.weight", "feed_forward.w1.weight", "ffn", "hidden", split=0),
    _layer_row("mlp.up_proj.weight", "feed_forward.w3.weight", "ffn", "hidden", split=0),
    _layer_row("mlp.down_proj.weight", "feed_forward.w2.weight", "hidden", "ffn", split=1),
    _layer_row("mlp.down_proj.bias", "feed_forward.w2.bias", "hidden"),
)
MOE_ROWS = (
    _layer_row("mlp.router.weight", "feed_forward.router.dense.weight", "experts", "hidden"),
    _expert_row("gate_proj.weight", "w1.weight", "ffn", "hidden", split=1),
    _expert_row("up_proj.weight", "w3.weight", "ffn", "hidden", split=1),
    _expert_row("down_proj.weight", "w2.weight", "hidden", "ffn", split=2),
    _expert_row("down_proj.bias", "w2.bias", "hidden"),
)
EXPERT_ROWS = tuple(row for row in MOE_ROWS if "{e}" in row.torch)
FINAL_NORM = Row("transformer.ln_f.weight", "model.norm_out.weight", ("hidden",))
LM_HEAD = Row("lm_head.weight", "lm_head.weight", ("vocab", "hidden"), split=0)  # absent when tied
ROWS = (EMBEDDING, *ATTENTION_ROWS, *DENSE_ROWS, *MOE_ROWS, FINAL_NORM, LM_HEAD)


@dataclass(frozen=True)
class Joined:
    """A parameter that inference has in place of several: its rows are those of the parts, one after another.

    ``parts``: MindSpore names with their rows. For tensor parallelism each rank's rows are arranged so.
    """

    mindspore: str
    parts: tuple[tuple[str, Rows], ...]


def _joined(name: str, *parts: tuple[str, Rows]) -> Joined:
    path = "model.layers.{{i}}.{}.weight".format
    return Joined(path(name), tuple((path(part), rows) for part, rows in parts))


JOINED = (
    _joined(
        "attention.w_qkv", ("attention.wq", "all"), ("attention.wk_v", "keys"), ("attention.wk_v", "values")
    ),
    # in dense models only: experts stay apart
    _joined("feed_forward.w_gate_hidden", ("feed_forward.w1", "all"), ("feed_forward.w3", "all")),
)

# What a checkpoint may hold beside weights: left out of the other side, and counted under these words.
_STATE_PER_WEIGHT = (
    "accu_grads|adam_[mv]|exp_avg|(max_)?exp_avg_sq|exp_avg_(sq|insta)_(row|col)|exp_inf|lamb_[mv]|moment[12s]?|"
    "muon_m|pma_weight_[a-z]+|vhat|accum(_update)?|mean_(grad|square)|stat|prev|step_size"
)
ROUTER_BIASES = "all-zero router biases"  # those of the parallel inference model; another value is an error
IGNORED: dict[Side, dict[str, re.Pattern[str]]] = {
    "torch": {"rotary buffers": re.compile(r".*rotary\w*\.(inv_freq|cos_cached|sin_cached)")},
    "mindspore": {
        "optimizer states": re.compile(rf"({_STATE_PER_WEIGHT})[._](model\.|lm_head\.).*"),
        "training counters and scalars": re.compile(
            r"epoch_num|step_num|global_step|(afactor|(current|last_overflow)_iterator)_step|global_batch_size|"
            r"loss_scale|scale_sense|learning_rate\w*|momentum|beta[12]_power|graceful_(exit|init)|"
            r"_device_local_\w+"
        ),
        "key/value caches": re.compile(r".*\.(key|value)_cache"),
        "routing statistics": re.compile(r"model\.layers\.\d+\.feed_forward\.(expert_load|drop_rate)"),
        ROUTER_BIASES: re.compile(
            r"model\.layers\.\d+\.feed_forward\.router\.(router\.topk_bias|e_score_correction_bias)"
        ),
    },
}


@dataclass(frozen=True)
class Weight:
    """One MindSpore parameter of a model of known sizes: a row with its layer, experts and shapes filled in.

    ``layer`` is None for what no layer has. ``torch`` holds the names and shapes of the torch tensors whose
    bytes, in this order, are the parameter's.
    """

    row: Row
    layer: int | None
    mindspore: str
    shape: tuple[int, ...]
    torch: Mapping[str, tuple[int, ...]]

    def shapes_on(self, side: Side) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of its tensors on that side."""
        return self.torch if side == "torch" else {self.mindspore: self.shape}


@lru_cache(maxsize=8)
def expand(sizes: TelechatSizes) -> tuple[Weight, ...]:
    """Every weight of a model, in the order of its layers; without ``lm_head`` when embeddings are tied."""
    dims = sizes.dims()
    layer_rows = ATTENTION_ROWS + (MOE_ROWS if sizes.num_experts else DENSE_ROWS)
    return (
        _fill(EMBEDDING, dims),
        *(_fill(row, dims, layer) for layer in range(sizes.num_layers) for row in layer_rows),
        *(_fill(row, dims) for row in (FINAL_NORM, LM_HEAD)[: 1 if sizes.tie_word_embeddings else 2]),
    )


def _fill(row: Row, dims: Mapping[str, int], layer: int | None = None) -> Weight:
    shape = tuple(dims[symbol] for symbol in row.shape)
    experts = range(dims["experts"] if "{e}" in row.torch else 1)
    return Weight(
        row,
        layer,
        row.mindspore.format(i=layer),
        tuple(dims[symbol] for symbol in row.shape_on("mindspore")),
        {row.torch.format(i=layer, e=expert): shape for expert in experts},
    )


def canonical_name(name: str, side: Side) -> str:
    """The table's spelling of a tensor's name: TeleChat v1 7B leaves ``transformer.`` out."""
    if side == "torch" and re.match(r"(h\.[0-9]+|word_embeddings|ln_f)\.", name):
        return f"transformer.{name}"
    return name


@dataclass(frozen=True)
class Place:
    """Where in the table a tensor's name is: its row, and the layer and the expert of the name, if any."""

    row: Row
    layer: int | None
    expert: int | None


@cache
def locate(name: str, side: Side) -> Place | None:
    """The place of a tensor's name; None if the table does not have it."""
    for row in ROWS:
        if match := _pattern(getattr(row, side)).fullmatch(name):
            at = {key: int(number) for key, number in match.groupdict().items()}
            return Place(row, at.get("i"), at.get("e"))
    return None


def locate_joined(name: str) -> tuple[Joined, int] | None:
    """The joined parameter, and its layer, that a MindSpore name is; None if it is none."""
    for joined in JOINED:
        if match := _pattern(joined.mindspore).fullmatch(name):
            return joined, int(match["i"])
    return None


@cache
def _pattern(name: str) -> re.Pattern[str]:
    pattern = re.escape(name)
    for key in ("i", "e"):
        pattern = pattern.replace(rf"\{{{key}\}}", rf"(?P<{key}>[0-9]{{1,9}})")
    return re.compile(pattern)


def ignored_as(name: str, side: Side) -> str | None:
    """What kind of non-weight a tensor is (a key of ``IGNORED``), None when it is not one."""
    return next((what for what, pattern in IGNORED[side].items() if pattern.fullmatch(name)), None)
