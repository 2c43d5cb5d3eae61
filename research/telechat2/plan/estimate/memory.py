"""What a device of a stage stores: parameters, gradients and optimizer to the byte, activations by formula.

The activations are what the operators of a layer need again in the backward pass, counted as Korthikanti et
al. 2022 (Reducing Activation Recomputation in Large Transformer Models, section 4) count them, for the
operators and dtypes here: SwiGLU, a flash attention that keeps no scores, a residual stream of its own dtype.
"""

from dataclasses import asdict, dataclass
from math import prod

from research.telechat2.checkpoint.table import EMBEDDING, FINAL_NORM, LM_HEAD, Row
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.config.moe import MoESettings
from research.telechat2.config.parallel import copies_of
from research.telechat2.config.pipeline import places
from research.telechat2.plan.estimate.schedule import Schedule
from research.telechat2.plan.estimate.workload import Workload

STATISTICS = 2 * 8 * 4  # bytes for each head and token: FlashAttentionScore's maxima and sums, eight times
SCORES = 4  # of a logit in the loss: float32


@dataclass(frozen=True)
class StoredParameter:
    """A parameter on one device.

    Attributes:
        name: as in the checkpoint.
        shape: of the whole.
        slice_shape: what the device computes with.
        local_shape: what it stores, less than that where the optimizer is sharded.
        number_bytes: of one number.
        compute_bytes: of one number as the device computes with it.
        gather_bytes: of one number when the shards are gathered.
        replicas: devices with the same slice. shards: how many of them shard it.
        trained: has a gradient and an optimizer's state.
    """

    name: str
    shape: tuple[int, ...]
    slice_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    number_bytes: int
    compute_bytes: int
    gather_bytes: int
    replicas: int
    shards: int
    trained: bool = True

    @property
    def bytes(self) -> int:
        return prod(self.local_shape) * self.number_bytes

    @property
    def slice_bytes(self) -> int:
        """Bytes of the slice, in the parameter's own dtype: those of its whole gradient."""
        return prod(self.slice_shape) * self.number_bytes

    @property
    def gathered_bytes(self) -> int:
        return prod(self.slice_shape) * self.gather_bytes

    @property
    def is_copied(self) -> bool:
        """Whether the device computes with another tensor than the stored one."""
        return len(self.shape) > 1 and (self.shards > 1 or self.compute_bytes != self.number_bytes)

    @property
    def computed_bytes(self) -> int:
        return prod(self.slice_shape) * self.compute_bytes


def stage_parameters(run: Workload, stage: int) -> list[StoredParameter]:
    """All parameters of a stage, from the table of weights."""
    found = [_stored(run, EMBEDDING)] if stage == 0 else []
    for layer, place in enumerate(places(run.layers)):
        if place.stage == stage:
            recomputed = place.number < run.recomputed[place.chunk][stage]
            found += [_stored(run, row, layer, recomputed) for row in run.layer_rows]
            if run.model.moe:
                found.append(_expert_load(run, layer))
    if stage == run.pp - 1:
        found.append(_stored(run, FINAL_NORM))
        found += [] if run.model.tie_word_embeddings else [_stored(run, LM_HEAD)]
    return found


def _expert_load(run: Workload, layer: int) -> StoredParameter:
    """What the experts took, kept for reports; no weight."""
    shape = (2, run.dims["experts"])
    name = f"model.layers.{layer}.feed_forward.expert_load"
    return StoredParameter(name, shape, shape, shape, 4, 4, 4, run.stage_devices, 1, trained=False)


def _stored(run: Workload, row: Row, layer: int | None = None, recomputed: bool = False) -> StoredParameter:
    """The part of a parameter that a device stores; ``recomputed``: its layer is recomputed as a whole.

    The plan splits a parameter into slices. MindSpore shards a slice further by its first axis, for the
    optimizer. It leaves it whole where that does not divide, where the parameter has fewer bytes than the
    threshold, and where the model says so, as for all of one axis.
    """
    shape = tuple(run.dims[symbol] for symbol in row.shape_on("mindspore"))
    number_bytes = _number_bytes(run, row)
    parts = _parts(run, row)
    slice_shape = tuple(size // number for size, number in zip(shape, parts, strict=True))
    replicas = run.stage_devices // prod(parts)
    shards = replicas if run.optimizer_shards < 1 else min(run.optimizer_shards, replicas)
    if not (
        run.shards_optimizer
        and len(shape) > 1
        and prod(shape) * number_bytes >= run.shard_threshold
        and slice_shape[0] % shards == 0
    ):
        shards = 1
    compute_bytes = gather_bytes = run.compute_bytes
    if row is EMBEDDING:  # cast after rows are taken, so that its shards are gathered as they are stored
        compute_bytes = gather_bytes = number_bytes
    elif row.mindspore.endswith("router.dense.weight"):
        compute_bytes = gather_bytes = 4  # computed in float32
    elif recomputed and copies_of(run.model) > 1:
        gather_bytes = number_bytes  # MindSpore casts before it gathers, but not where copies are recomputed
    return StoredParameter(
        name=row.mindspore.format(i=layer),
        shape=shape,
        slice_shape=slice_shape,
        local_shape=(slice_shape[0] // shards, *slice_shape[1:]),
        number_bytes=number_bytes,
        compute_bytes=compute_bytes,
        gather_bytes=gather_bytes,
        replicas=replicas,
        shards=shards,
    )


def _number_bytes(run: Workload, row: Row) -> int:
    if row is EMBEDDING:
        return WIDTH[run.model.embedding_init_type]
    return WIDTH[run.model.layernorm_compute_type if "norm" in row.mindspore else run.model.param_init_type]


def _parts(run: Workload, row: Row) -> list[int]:
    """Parts into which the plan splits each axis of a parameter."""
    symbols = row.shape_on("mindspore")
    parts = [1] * len(symbols)
    if len(symbols) == 3:  # the experts' matrices
        parts[0] = run.expert_ranks
    if row.split is not None:
        widths = {"vocab": run.vocab_parts, "ffn": run.width_parts}
        parts[row.split] = widths.get(symbols[row.split], run.mp)
    return parts


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each device of a stage.

    Attributes:
        parameters: as they are stored.
        gradients: those that are kept: of the stored parameters, or where micro-batches are accumulated of
            the whole slices.
        optimizer: AdamW's two moments, float32.
        gathered: weights in the compute dtype, whole slices, kept from their gathering to the backward pass.
        activations: of all micro-batches in flight, when the stage has most of them.
        working: one layer's activations while it is recomputed, or the loss with its logits.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of them. What MindSpore and CANN need besides (2 to 4 GB) is not estimated."""
        return sum(asdict(self).values())


def stage_memory(run: Workload, stage: int, passes: Schedule) -> StageMemory:
    """Of a device of ``stage``, with the micro-batches in flight of a schedule."""
    stored = stage_parameters(run, stage)
    trained = [parameter for parameter in stored if parameter.trained]
    accumulates = run.micro_batches > 1
    return StageMemory(
        parameters=sum(parameter.bytes for parameter in stored),
        gradients=sum(p.slice_bytes if accumulates else p.bytes for p in trained),
        optimizer=sum(2 * 4 * prod(parameter.local_shape) for parameter in trained),
        gathered=sum(p.computed_bytes for p in trained if not run.regathers_weights and p.is_copied),
        activations=sum(
            passes.in_flight[chunk][stage] * chunk_activations(run, chunk, stage)
            for chunk in range(run.chunks)
        ),
        working=_working(run, stage),
    )


def chunk_activations(run: Workload, chunk: int, stage: int) -> int:
    """Bytes that a chunk of a stage keeps for one micro-batch."""
    layers, recomputed = run.layers[chunk][stage], run.recomputed[chunk][stage]
    total = min(recomputed, layers) * layer_input(run)
    for number in range(recomputed, layers):
        selected, regathered = number < run.selected[chunk][stage], number < run.regathered[chunk][stage]
        total += layer_activations(run, selected, regathered)
    if run.is_last(chunk, stage):
        total += _output_activations(run)
    return total


def layer_input(run: Workload) -> int:
    """Bytes of what a recomputed layer keeps."""
    sliced = run.sequence_parallel or run.model.parallel_config.recompute.recompute_slice_activation
    parts = run.mp if sliced else 1
    return run.tokens * run.model.hidden_size * run.residual_bytes // parts


def layer_activations(run: Workload, selected: bool = False, regathered: bool = False) -> int:
    """Bytes that a layer keeps for one micro-batch.

    Args:
        selected: the product of its feed-forward block is recomputed.
        regathered: the inputs of its projections are gathered again.
    """
    tokens, hidden, number = run.tokens, run.model.hidden_size, run.compute_bytes
    streams = 2 * tokens * hidden * run.residual_bytes // run.token_parts  # into both norms
    inputs = tokens * hidden * number // (run.token_parts if regathered else 1)  # of a block's projections
    # Rotated queries and keys, values, and attention's result, which is the input of wo as well.
    attention = tokens * (2 * hidden + 2 * run.gather * run.kv_size) * number // run.mp
    attention += tokens * run.model.num_heads * STATISTICS // run.mp
    if run.model.moe:
        feed_forward = _expert_activations(run, run.model.moe, selected)
    else:
        feed_forward = inputs + _width(run, tokens, selected)
    return streams + inputs + attention + feed_forward


def _width(run: Workload, rows: int, selected: bool) -> int:
    """Gate, up and their product, of the rows' part of the width."""
    return (2 if selected else 3) * rows * run.model.intermediate_size * run.compute_bytes // run.width_parts


def _expert_activations(run: Workload, moe: MoESettings, selected: bool) -> int:
    """Router, rows sent and received, products, and the answers before they are weighted."""
    tokens = run.tokens // run.token_parts
    router = tokens * (run.model.hidden_size + 3 * moe.num_experts + 2 * moe.top_k) * 4
    block = run.model.hidden_size * run.compute_bytes
    rows = run.received_rows + run.expert_rows
    return router + rows * block + _width(run, run.received_rows, selected)


def _output_activations(run: Workload) -> int:
    """The last norm's input, and the output projection's."""
    stream = run.tokens * run.model.hidden_size * run.residual_bytes // run.token_parts
    parts = run.token_parts if run.vocab_parts == 1 else 1
    return stream + run.tokens * run.model.hidden_size * run.compute_bytes // parts


def _working(run: Workload, stage: int) -> int:
    """The larger one of a recomputed layer and, on the last stage, of the loss.

    The loss keeps logits in the compute dtype and in float32, their softmax and their gradient in float32.
    """
    layer = layer_activations(run) if any(row[stage] for row in run.recomputed) else 0
    if stage < run.pp - 1:
        return layer
    parts = run.vocab_parts if run.vocab_parts > 1 else run.token_parts
    return max(layer, run.tokens * run.model.vocab_size * (run.compute_bytes + 3 * SCORES) // parts)
