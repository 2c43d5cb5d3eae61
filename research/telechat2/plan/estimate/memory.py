"""What a device of a stage stores: parameters, gradients and optimizer to the byte, activations by formula.

The activations are what the operators of a layer need again in the backward pass, counted as Korthikanti et
al. 2022 (Reducing Activation Recomputation in Large Transformer Models, section 4) count them, for the
operators and dtypes here: SwiGLU, a flash attention that keeps no scores, a residual stream of its own dtype.
"""

from dataclasses import asdict, dataclass
from math import prod

from research.telechat2.config.pipeline import places
from research.telechat2.plan.estimate.schedule import Schedule
from research.telechat2.plan.estimate.workload import Workload

STATISTICS = (
    2 * 8 * 4
)  # bytes for each head and token: FlashAttentionScore's maxima and sums, eight times each
SCORES = 4  # of a logit in the loss: float32


@dataclass(frozen=True)
class StoredParameter:
    """A parameter on one device.

    Attributes:
        name: as in the checkpoint.
        shape: of the whole.
        slice_shape: what the device computes with.
        local_shape: what it stores, less than that where the optimizer's work is shared out.
        number_bytes: of one number.
        compute_bytes: of one number as the device computes with it.
        gather_bytes: of one number when the shards are gathered.
        replicas: devices with the same slice. shards: how many of them share it out.
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
        """Bytes that the device stores."""
        return prod(self.local_shape) * self.number_bytes

    @property
    def slice_bytes(self) -> int:
        """Bytes of the slice, in the parameter's own dtype: those of its gradient before it is shared out."""
        return prod(self.slice_shape) * self.number_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the slice when its shards are gathered."""
        return prod(self.slice_shape) * self.gather_bytes

    @property
    def computed_bytes(self) -> int:
        """Bytes of the slice as the device computes with it."""
        return prod(self.slice_shape) * self.compute_bytes


def stage_parameters(run: Workload, stage: int) -> list[StoredParameter]:
    """All parameters of a stage, in the model's order."""
    found = []
    if stage == 0:
        found.append(_embedding(run))
    for index, place in enumerate(places(run.layers)):
        if place.stage == stage:
            again = place.number < run.whole[place.chunk][stage]
            found += layer_parameters(run, f"model.layers.{index}", again)
    if stage == run.pp - 1:
        found.append(_vector(run, "model.norm_out.weight", run.hidden_size, run.norm_bytes))
        if not run.tie_word_embeddings:
            shape = (run.vocab_size, run.hidden_size)
            found.append(_stored(run, "lm_head.weight", shape, (run.vocabulary, 1)))
    return found


def layer_parameters(run: Workload, prefix: str, again: bool) -> list[StoredParameter]:
    """Those of a decoder layer; ``again``: it is computed again as a whole."""
    hidden, mp = run.hidden_size, run.mp
    # MindSpore casts before it gathers, but not where copies of a layer are computed again.
    gathered = run.parameter_bytes if again and run.fine_grain > 1 else run.compute_bytes

    def matrix(name, rows, columns, split):
        return _stored(run, f"{prefix}.{name}.weight", (rows, columns), split, gather_bytes=gathered)

    attention = [
        _vector(run, f"{prefix}.attention_norm.weight", hidden, run.norm_bytes),
        matrix("attention.wq", hidden, hidden, (mp, 1)),
        matrix("attention.wk_v", 2 * run.kv_size, hidden, (mp, 1)),
        matrix("attention.wo", hidden, hidden, (1, mp)),
        _vector(run, f"{prefix}.attention.wo.bias", hidden, run.parameter_bytes),
        _vector(run, f"{prefix}.ffn_norm.weight", hidden, run.norm_bytes),
    ]
    if run.moe:
        return attention + _experts(run, f"{prefix}.feed_forward")
    width = run.intermediate_size
    return attention + [
        matrix("feed_forward.w1", width, hidden, (mp, 1)),
        matrix("feed_forward.w3", width, hidden, (mp, 1)),
        matrix("feed_forward.w2", hidden, width, (1, mp)),
        _vector(run, f"{prefix}.feed_forward.w2.bias", hidden, run.parameter_bytes),
    ]


def _experts(run: Workload, prefix: str) -> list[StoredParameter]:
    experts, hidden, width = run.moe.num_experts, run.hidden_size, run.intermediate_size
    owners, parts = run.owners, run.width_parts
    whole = (1, 1, 1)
    load = (2, experts)  # what the experts took, kept for reports
    return [
        StoredParameter(
            f"{prefix}.expert_load", load, load, load, 4, 4, 4, run.stage_devices, 1, trained=False
        ),
        # The router is computed in float32.
        _stored(run, f"{prefix}.router.dense.weight", (experts, hidden), (1, 1), compute_bytes=4),
        _stored(run, f"{prefix}.ffn.w1.weight", (experts, width, hidden), (owners, parts, 1)),
        _stored(run, f"{prefix}.ffn.w3.weight", (experts, width, hidden), (owners, parts, 1)),
        _stored(run, f"{prefix}.ffn.w2.weight", (experts, hidden, width), (owners, 1, parts)),
        _stored(run, f"{prefix}.ffn.w2.bias", (1, experts, 1, hidden), (*whole, 1)),
    ]


def _embedding(run: Workload) -> StoredParameter:
    shape, number = (run.vocab_size, run.hidden_size), run.embedding_bytes
    # It is cast after rows are taken, so that its shards are gathered as they are stored.
    return _stored(run, "model.tok_embeddings.embedding_weight", shape, (run.vocabulary, 1), number, number)


def _vector(run: Workload, name: str, size: int, number_bytes: int) -> StoredParameter:
    """A norm's weight or a bias: whole on every device."""
    return _stored(run, name, (size,), (1,), number_bytes)


def _stored(
    run: Workload,
    name: str,
    shape: tuple[int, ...],
    split: tuple[int, ...],
    number_bytes: int | None = None,
    compute_bytes: int | None = None,
    gather_bytes: int | None = None,
) -> StoredParameter:
    """Share out what the plan's split leaves.

    MindSpore shares a slice out by its first axis, and leaves it whole where that does not divide, where the
    parameter has fewer bytes than the threshold, and where it is told to, as for all of one axis.
    """
    number_bytes = number_bytes or run.parameter_bytes
    slice_shape = tuple(size // parts for size, parts in zip(shape, split, strict=True))
    replicas = run.stage_devices // prod(split)
    shards = replicas if run.weight_shards < 1 else min(run.weight_shards, replicas)
    shared = (
        run.shares_optimizer
        and len(shape) > 1
        and prod(shape) * number_bytes >= run.threshold
        and slice_shape[0] % shards == 0
    )
    shards = shards if shared else 1
    local_shape = (slice_shape[0] // shards, *slice_shape[1:]) if shared else slice_shape
    compute_bytes = compute_bytes or run.compute_bytes
    gather_bytes = gather_bytes or compute_bytes
    return StoredParameter(
        name, shape, slice_shape, local_shape, number_bytes, compute_bytes, gather_bytes, replicas, shards
    )


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each device of a stage.

    Attributes:
        parameters: as they are stored.
        gradients: those that are kept: of the stored parameters, or where micro-batches are added up of the
            whole slices.
        optimizer: AdamW's two moments, float32.
        gathered: weights in the compute dtype, whole slices, kept from their gathering to the backward pass.
        activations: of all micro-batches in flight, when the stage has most of them.
        working: one layer's activations while it is computed again, or the loss with its logits.
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


def stage_memory(run: Workload, stage: int, in_flight: Schedule) -> StageMemory:
    """Of a device of ``stage``, with the micro-batches in flight that the schedule says."""
    stored = stage_parameters(run, stage)
    trained = [parameter for parameter in stored if parameter.trained]
    accumulates = run.micro_batches > 1
    activations = sum(
        in_flight.in_flight[chunk][stage] * chunk_activations(run, chunk, stage)
        for chunk in range(run.chunks)
    )
    return StageMemory(
        parameters=sum(parameter.bytes for parameter in stored),
        gradients=sum(p.slice_bytes if accumulates else p.bytes for p in trained),
        optimizer=sum(2 * 4 * prod(parameter.local_shape) for parameter in trained),
        gathered=sum(_gathered(run, parameter) for parameter in trained),
        activations=activations,
        working=_working(run, stage),
    )


def _gathered(run: Workload, parameter) -> int:
    """Bytes of a weight as it is computed with, where that is another tensor than the stored one."""
    same = parameter.shards == 1 and parameter.compute_bytes == parameter.number_bytes
    if same or len(parameter.shape) == 1 or run.gathers_again:
        return 0
    return parameter.computed_bytes


def chunk_activations(run: Workload, chunk: int, stage: int) -> int:
    """Bytes that a chunk of a stage keeps for one micro-batch."""
    layers, whole = run.layers[chunk][stage], run.whole[chunk][stage]
    total = min(whole, layers) * layer_input(run)
    for number in range(whole, layers):
        selected, gathers = number < run.selected[chunk][stage], number < run.gathers[chunk][stage]
        total += layer_activations(run, selected, gathers)
    if chunk == run.chunks - 1 and stage == run.pp - 1:
        total += _output_activations(run)
    return total


def layer_input(run: Workload) -> int:
    """Bytes of what a layer that is computed again keeps."""
    parts = run.mp if run.sequence_parallel or run.slice_kept else 1
    return run.tokens * run.hidden_size * run.residual_bytes // parts


def layer_activations(run: Workload, selected: bool = False, gathers: bool = False) -> int:
    """Bytes that a layer keeps for one micro-batch.

    Args:
        selected: the product of its feed-forward block is computed again.
        gathers: the inputs of its projections are gathered again.
    """
    tokens, hidden, number = run.tokens, run.hidden_size, run.compute_bytes
    streams = 2 * tokens * hidden * run.residual_bytes // run.token_parts  # into both norms
    inputs = tokens * hidden * number // (run.token_parts if gathers else 1)  # of a block's projections
    # Rotated queries and keys, values, and attention's result, which is the input of wo as well.
    attention = tokens * (2 * hidden + 2 * run.gather * run.kv_size) * number // run.mp
    attention += tokens * run.num_heads * STATISTICS // run.mp
    feed_forward = _expert_activations(run, selected) if run.moe else inputs + _width(run, tokens, selected)
    return streams + inputs + attention + feed_forward


def _width(run: Workload, rows: int, selected: bool) -> int:
    """Gate, up and their product, of the rows' part of the width."""
    return (2 if selected else 3) * rows * run.intermediate_size * run.compute_bytes // run.width_parts


def _expert_activations(run: Workload, selected: bool) -> int:
    """Router, rows sent and received, products, and the answers before they are weighted."""
    tokens, moe = run.tokens // run.token_parts, run.moe
    router = tokens * (run.hidden_size + 3 * moe.num_experts + 2 * moe.top_k) * 4
    spread = run.mp if run.sequence_parallel else 1
    received = run.expert_rows * (spread if run.width_parts > 1 else 1)
    block = run.hidden_size * run.compute_bytes
    return router + received * block + run.expert_rows * block + _width(run, received, selected)


def _output_activations(run: Workload) -> int:
    """The last norm's input, and the output projection's."""
    stream = run.tokens * run.hidden_size * run.residual_bytes // run.token_parts
    parts = run.token_parts if run.vocabulary == 1 else 1
    return stream + run.tokens * run.hidden_size * run.compute_bytes // parts


def _working(run: Workload, stage: int) -> int:
    """The larger one of a layer that is computed again and, on the last stage, of the loss.

    The loss keeps logits in the compute dtype and in float32, their softmax and their gradient in float32.
    """
    again = any(row[stage] for row in run.whole)
    layer = layer_activations(run) if again else 0
    if stage < run.pp - 1:
        return layer
    parts = run.vocabulary if run.vocabulary > 1 else run.token_parts
    return max(layer, run.tokens * run.vocab_size * (run.compute_bytes + 3 * SCORES) // parts)
