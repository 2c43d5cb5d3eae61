"""What a device sends in a step, by kind and group: the collectives of the compiled graph, by formula.

A group of n devices holds one tensor together. An all-gather, a reduce-scatter and an all-to-all send (n-1)/n
of it from each device, an all-reduce twice that. What is smaller than the hidden states of a micro-batch, as
are the loss's numbers for each token, is left out.
"""

from collections import Counter
from dataclasses import dataclass, replace

from research.telechat2.common.dtypes import WIDTH
from research.telechat2.plan.estimate.memory import stage_parameters
from research.telechat2.plan.estimate.workload import Workload

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "AllGather", "ReduceScatter", "AllReduce"
ALL_TO_ALL, SEND = "AlltoAll", "Send"
FORWARD, BACKWARD, RECOMPUTE = "forward", "backward", "recompute"


@dataclass(frozen=True)
class Communication:
    """A collective, as often as it runs.

    Attributes:
        kind: as in the graph.
        group: ``tensor``, ``context``, ``data`` (the replicas of parameters), ``experts`` or ``pipeline``.
        phase: ``forward``, ``backward`` or ``recompute``.
        what: what it carries.
        ranks: devices of the group. stride: the distance of their numbers.
        tensor_bytes: of the tensor that they hold together; of a Send's.
        count: executions.
    """

    kind: str
    group: str
    phase: str
    what: str
    ranks: int
    stride: int
    tensor_bytes: int
    count: int = 1

    @property
    def bytes(self) -> int:
        """Bytes that a device sends, by an algorithm that sends as little as is possible."""
        if self.kind == SEND:
            return self.tensor_bytes * self.count
        once = self.tensor_bytes * (self.ranks - 1) // self.ranks
        return once * self.count * (2 if self.kind == ALL_REDUCE else 1)


def layer_communication(
    run: Workload, recomputed: bool, regathered: bool, first: bool = False
) -> list[Communication]:
    """A decoder layer's with one micro-batch.

    Args:
        recomputed: the layer is recomputed as a whole.
        regathered: its all-gathers are repeated.
        first: it follows the embedding.
    """
    options = run.model.parallel_config.recompute
    repeats = recomputed and options.mp_comm_recompute
    found = _blocks(run, repeats, regathered) if run.mp > 1 else []
    found += _context(run, repeats)
    # Without sequence parallelism the input is kept in slices; MindSpore keeps an embedding's whole.
    sliced = recomputed and run.mp > 1 and options.recompute_slice_activation and not run.sequence_parallel
    if sliced and (run.model.moe or not first):
        kept = run.tokens * run.model.hidden_size * run.residual_bytes
        found.append(_tensor(run, ALL_GATHER, RECOMPUTE, "kept inputs", kept))
    if run.model.moe:
        found += _exchanges(run, recomputed)
    return found


def _blocks(run: Workload, repeats: bool, regathered: bool) -> list[Communication]:
    """Of attention and, in a dense layer, of the feed-forward block, over the tensor-parallel group."""
    hidden = run.tokens * run.model.hidden_size * run.compute_bytes
    blocks = 1 if run.model.moe else 2
    kinds = (ALL_GATHER, REDUCE_SCATTER) if run.sequence_parallel else (ALL_REDUCE,)
    found = [
        _tensor(run, kind, phase, "hidden states", hidden, blocks)
        for phase in (FORWARD, BACKWARD)
        for kind in kinds
    ]
    if run.sequence_parallel and (repeats or regathered):
        found.append(_tensor(run, ALL_GATHER, RECOMPUTE, "hidden states", hidden, blocks))
    if repeats:  # of one block: what the layer itself returns is not needed again
        found.append(_tensor(run, kinds[-1], RECOMPUTE, "hidden states", hidden))
    return found


def _context(run: Workload, repeats: bool) -> list[Communication]:
    """Of attention where sequences are split: exchanges of heads for tokens and back, and gathered keys."""
    query = run.tokens * run.model.hidden_size * run.compute_bytes // run.mp
    key = run.tokens * run.kv_size * run.compute_bytes // run.mp
    found = []
    for phase in (FORWARD, BACKWARD, RECOMPUTE) if repeats else (FORWARD, BACKWARD):
        if run.exchange > 1:  # queries and answers, keys and values
            for what, size in (("heads of queries", query), ("heads of keys", key)):
                found.append(Communication(ALL_TO_ALL, "context", phase, what, run.exchange, run.mp, size, 2))
        if run.gather > 1:
            kind, stride = REDUCE_SCATTER if phase == BACKWARD else ALL_GATHER, run.mp * run.exchange
            group = ("context", phase, "keys and values", run.gather, stride)
            found.append(Communication(kind, *group, key * run.gather, 2))
    return found


def _exchanges(run: Workload, recomputed: bool) -> list[Communication]:
    """Tokens to their experts and back."""
    rows = run.expert_rows * run.model.hidden_size * run.compute_bytes
    repeats_outputs = recomputed and run.recomputes_outputs
    found = []
    if run.expert_ranks > 1:
        stride = 1 if run.experts_over_tp else run.mp
        for phase, count in ((FORWARD, 2), (BACKWARD, 2), (RECOMPUTE, recomputed + repeats_outputs)):
            group = ("experts", phase, "expert rows", run.expert_ranks, stride)
            found.append(Communication(ALL_TO_ALL, *group, rows, count))
    if run.width_parts > 1 and run.sequence_parallel:
        times = {FORWARD: (1, 1), BACKWARD: (1, 1), RECOMPUTE: (recomputed, repeats_outputs)}
        for phase, (gathers, scatters) in times.items():
            found.append(_tensor(run, ALL_GATHER, phase, "expert rows", rows * run.mp, gathers))
            found.append(_tensor(run, REDUCE_SCATTER, phase, "expert rows", rows * run.mp, scatters))
    elif run.width_parts > 1:
        answers = run.tokens * run.model.hidden_size * run.compute_bytes
        for phase in (FORWARD, BACKWARD):
            found.append(_tensor(run, ALL_REDUCE, phase, "answers of experts", answers))
    return [item for item in found if item.count]


def _vocabulary(run: Workload, embedding: bool) -> list[Communication]:
    """The embedding's or the output projection's with one micro-batch.

    The parts of the embedding that have a token's row give it to the others. Without sequence parallelism the
    output projection has none: a gradient is summed where the forward pass sums, in the layers and in the
    embedding.
    """
    if run.vocab_parts == 1 or not (embedding or run.sequence_parallel):
        return []
    kinds = (REDUCE_SCATTER, ALL_GATHER) if embedding else (ALL_GATHER, REDUCE_SCATTER)
    forward, backward = kinds if run.sequence_parallel else (ALL_REDUCE, ALL_REDUCE)
    what = "embeddings" if embedding else "hidden states"
    number = WIDTH[run.model.embedding_init_type] if embedding else run.compute_bytes
    size = run.tokens * run.model.hidden_size * number
    return [_tensor(run, kind, way, what, size) for kind, way in ((forward, FORWARD), (backward, BACKWARD))]


def _pipeline(run: Workload, chunk: int, stage: int) -> list[Communication]:
    """What a chunk of a stage sends to its neighbours with one micro-batch: hidden states and gradients."""
    size = run.tokens // run.token_parts * run.model.hidden_size * run.residual_bytes
    sends = []
    if run.pp > 1 and not run.is_last(chunk, stage):
        sends.append((FORWARD, "hidden states"))
    if run.pp > 1 and not chunk == stage == 0:
        sends.append((BACKWARD, "gradients"))
    return [Communication(SEND, "pipeline", *what, 2, run.stage_devices, size) for what in sends]


def micro_batch_communication(run: Workload, chunk: int, stage: int) -> list[Communication]:
    """All that a chunk of a stage communicates with one micro-batch."""
    found: list[Communication] = []
    if chunk == stage == 0:
        found += _vocabulary(run, embedding=True)
    for number in range(run.layers[chunk][stage]):
        recomputed = number < run.recomputed[chunk][stage]
        regathered = not recomputed and number < run.regathered[chunk][stage]
        found += layer_communication(run, recomputed, regathered, chunk == stage == number == 0)
    if run.is_last(chunk, stage):
        found += _vocabulary(run, embedding=False)
    return merged(found + _pipeline(run, chunk, stage))


def optimizer_communication(run: Workload, stage: int) -> list[Communication]:
    """What a stage communicates once a step: weights are gathered, gradients summed and sharded."""
    found = []
    for parameter in stage_parameters(run, stage):
        shards, stride = parameter.shards, run.stage_devices // parameter.replicas
        weights, gradients = ("weights", shards, stride), ("gradients", shards, stride)
        copies = ("gradients", parameter.replicas // shards, stride * shards)
        size = parameter.slice_bytes
        again = run.regathers_weights and "embedding" not in parameter.name
        for phase in (FORWARD, RECOMPUTE) if again else (FORWARD,):
            found.append(Communication(ALL_GATHER, "data", phase, *weights, parameter.gathered_bytes))
        if parameter.trained:
            found.append(Communication(REDUCE_SCATTER, "data", BACKWARD, *gradients, size))
            found.append(Communication(ALL_REDUCE, "data", BACKWARD, *copies, size // shards))
    return merged([item for item in found if item.ranks > 1])


def stage_communication(run: Workload, stage: int) -> list[Communication]:
    """All that a device of a stage sends in a step."""
    each = [item for chunk in range(run.chunks) for item in micro_batch_communication(run, chunk, stage)]
    found = [replace(item, count=item.count * run.micro_batches) for item in each]
    return merged(found + optimizer_communication(run, stage))


def merged(found: list[Communication]) -> list[Communication]:
    """Equal collectives as one, and those of one kind that differ in size as one large tensor."""
    sums: Counter[tuple[str, str, str, str, int, int]] = Counter()
    for item in found:
        key = (item.kind, item.group, item.phase, item.what, item.ranks, item.stride)
        sums[key] += item.tensor_bytes * item.count
    return [Communication(*key, size) for key, size in sums.items()]


def _tensor(run: Workload, kind: str, phase: str, what: str, size: int, count: int = 1) -> Communication:
    return Communication(kind, "tensor", phase, what, run.mp, 1, size, count)
