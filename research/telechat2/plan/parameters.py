"""The parameters of a stage, and which part of each a device stores: MindSpore's layout rules."""

from dataclasses import dataclass
from math import prod

from research.telechat2.plan.workload import Workload
from research.telechat2.telechat_pipeline import places


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
