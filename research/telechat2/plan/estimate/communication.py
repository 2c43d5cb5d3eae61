"""What a device sends in a step, by kind and group: the collectives of the compiled graph, by formula.

A group of n devices holds one tensor together. An all-gather, a reduce-scatter and an all-to-all send (n-1)/n
of it from each device, an all-reduce twice that. What is smaller than the hidden states of a micro-batch, as
are the loss's numbers for each token, is left out.
"""

from dataclasses import dataclass

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
    run: Workload, again: bool, gathers_again: bool, first: bool = False
) -> list[Communication]:
    """A decoder layer's with one micro-batch.

    Args:
        again: the layer is computed again as a whole.
        gathers_again: its gathers are done again.
        first: it follows the embedding.
    """
    found = []
    if run.mp > 1:
        found += _blocks(run, again, gathers_again)
    found += _context(run, again and run.gathers_in_whole)
    # Without sequence parallelism the input is kept in parts; MindSpore keeps an embedding's as it is.
    if again and run.mp > 1 and run.slice_kept and not run.sequence_parallel and (run.moe or not first):
        kept = run.tokens * run.hidden_size * run.residual_bytes
        found.append(_tensor(run, ALL_GATHER, RECOMPUTE, "kept inputs", kept))
    if run.moe:
        found += _exchanges(run, again)
    return found


def _blocks(run: Workload, again: bool, gathers_again: bool) -> list[Communication]:
    """Of attention and, in a dense layer, of the feed-forward block, over the tensor-parallel group."""
    hidden = run.tokens * run.hidden_size * run.compute_bytes
    blocks = 1 if run.moe else 2
    repeats = again and run.gathers_in_whole
    found = []
    if run.sequence_parallel:
        for phase in (FORWARD, BACKWARD):
            found.append(_tensor(run, ALL_GATHER, phase, "hidden states", hidden, blocks))
            found.append(_tensor(run, REDUCE_SCATTER, phase, "hidden states", hidden, blocks))
        if repeats or gathers_again:
            found.append(_tensor(run, ALL_GATHER, RECOMPUTE, "hidden states", hidden, blocks))
        if repeats:  # what the layer itself returns is not needed again
            found.append(_tensor(run, REDUCE_SCATTER, RECOMPUTE, "hidden states", hidden))
        return found
    for phase in (FORWARD, BACKWARD):
        found.append(_tensor(run, ALL_REDUCE, phase, "hidden states", hidden, blocks))
    if repeats:
        found.append(_tensor(run, ALL_REDUCE, RECOMPUTE, "hidden states", hidden))
    return found


def _context(run: Workload, repeats: bool) -> list[Communication]:
    """Of attention where sequences are split: exchanges of heads for tokens and back, and gathered keys."""
    query, key = (run.tokens * size * run.compute_bytes // run.mp for size in (run.hidden_size, run.kv_size))
    phases = (FORWARD, BACKWARD, RECOMPUTE) if repeats else (FORWARD, BACKWARD)
    found = []
    for phase in phases:
        if run.exchange > 1:  # queries and answers, keys and values
            for what, size in (("heads of queries", query), ("heads of keys", key)):
                group = ("context", phase, what, run.exchange, run.mp)
                found.append(Communication(ALL_TO_ALL, *group, size, 2))
        if run.gather > 1:
            kind = REDUCE_SCATTER if phase == BACKWARD else ALL_GATHER
            group = ("context", phase, "keys and values", run.gather, run.mp * run.exchange)
            found.append(Communication(kind, *group, key * run.gather, 2))
    return found


def _exchanges(run: Workload, again: bool) -> list[Communication]:
    """Tokens to their experts and back."""
    rows = run.expert_rows * run.hidden_size * run.compute_bytes
    found = []
    stride = 1 if run.extends else run.mp
    back = again and run.answers_again
    if run.owners > 1:
        for phase, count in ((FORWARD, 2), (BACKWARD, 2), (RECOMPUTE, again + back)):
            found.append(
                Communication(ALL_TO_ALL, "experts", phase, "expert rows", run.owners, stride, rows, count)
            )
    if run.width_parts > 1 and run.sequence_parallel:
        whole = rows * run.mp
        for phase in (FORWARD, BACKWARD):
            found.append(_tensor(run, ALL_GATHER, phase, "expert rows", whole))
            found.append(_tensor(run, REDUCE_SCATTER, phase, "expert rows", whole))
        if again:
            found.append(_tensor(run, ALL_GATHER, RECOMPUTE, "expert rows", whole))
        if back:
            found.append(_tensor(run, REDUCE_SCATTER, RECOMPUTE, "expert rows", whole))
    elif run.width_parts > 1:
        answers = run.tokens * run.hidden_size * run.compute_bytes
        for phase in (FORWARD, BACKWARD):
            found.append(_tensor(run, ALL_REDUCE, phase, "answers of experts", answers))
    return [item for item in found if item.count]


def embedding_communication(run: Workload) -> list[Communication]:
    """The embedding's with one micro-batch: the parts that have a token's row give it to the others."""
    if run.vocabulary == 1:
        return []
    size = run.tokens * run.hidden_size * run.embedding_bytes
    if run.sequence_parallel:
        ways = ((REDUCE_SCATTER, FORWARD), (ALL_GATHER, BACKWARD))
        return [_tensor(run, kind, phase, "embeddings", size) for kind, phase in ways]
    return [_tensor(run, ALL_REDUCE, phase, "embeddings", size) for phase in (FORWARD, BACKWARD)]


def output_communication(run: Workload) -> list[Communication]:
    """The output projection's with one micro-batch.

    Without sequence parallelism it has none: a gradient is added up where the forward pass adds up, in the
    layers and in the embedding.
    """
    if run.vocabulary == 1 or not run.sequence_parallel:
        return []
    size = run.tokens * run.hidden_size * run.compute_bytes
    ways = ((ALL_GATHER, FORWARD), (REDUCE_SCATTER, BACKWARD))
    return [_tensor(run, kind, phase, "hidden states", size) for kind, phase in ways]


def pipeline_communication(run: Workload, chunk: int, stage: int) -> list[Communication]:
    """What a chunk of a stage sends to its neighbours with one micro-batch: hidden states and gradients."""
    size = run.tokens // run.token_parts * run.hidden_size * run.residual_bytes
    first = chunk == stage == 0
    last = chunk == run.chunks - 1 and stage == run.pp - 1
    stride = run.stage_devices
    if run.pp == 1:
        return []
    sends = ((FORWARD, "hidden states", not last), (BACKWARD, "gradients", not first))
    return [
        Communication(SEND, "pipeline", phase, what, 2, stride, size) for phase, what, there in sends if there
    ]


def micro_batch_communication(run: Workload, chunk: int, stage: int) -> list[Communication]:
    """All that a chunk of a stage communicates with one micro-batch."""
    found = []
    if chunk == stage == 0:
        found += embedding_communication(run)
    for number in range(run.layers[chunk][stage]):
        again = number < run.whole[chunk][stage]
        gathers_again = not again and number < run.gathers[chunk][stage]
        found += layer_communication(run, again, gathers_again, chunk == stage == number == 0)
    if chunk == run.chunks - 1 and stage == run.pp - 1:
        found += output_communication(run)
    return merged(found + pipeline_communication(run, chunk, stage))


def optimizer_communication(run: Workload, stage: int) -> list[Communication]:
    """What a stage communicates once a step: weights are gathered, gradients added up and shared out."""
    found = []
    for parameter in stage_parameters(run, stage):
        stride = run.stage_devices // parameter.replicas
        rest = parameter.replicas // parameter.shards

        def of_data(kind, phase, what, ranks, size, stride=stride):
            if ranks > 1:
                found.append(Communication(kind, "data", phase, what, ranks, stride, size))

        of_data(ALL_GATHER, FORWARD, "weights", parameter.shards, parameter.gathered_bytes)
        if run.gathers_again and "embedding" not in parameter.name:
            of_data(ALL_GATHER, RECOMPUTE, "weights", parameter.shards, parameter.gathered_bytes)
        if not parameter.trained:
            continue
        of_data(REDUCE_SCATTER, BACKWARD, "gradients", parameter.shards, parameter.slice_bytes)
        shared = parameter.slice_bytes // parameter.shards
        of_data(ALL_REDUCE, BACKWARD, "gradients", rest, shared, stride * parameter.shards)
    return merged(found)


def stage_communication(run: Workload, stage: int) -> list[Communication]:
    """All that a device of a stage sends in a step."""
    found = []
    for chunk in range(run.chunks):
        for item in micro_batch_communication(run, chunk, stage):
            found += [item] * run.micro_batches
    return merged(found + optimizer_communication(run, stage))


def merged(found: list[Communication]) -> list[Communication]:
    """Equal collectives as one, and those of one kind that differ in size as one large tensor."""
    sums: dict[tuple, int] = {}
    for item in found:
        key = (item.kind, item.group, item.phase, item.what, item.ranks, item.stride)
        sums[key] = sums.get(key, 0) + item.tensor_bytes * item.count
    return [Communication(*key, size) for key, size in sums.items()]


def _tensor(run: Workload, kind: str, phase: str, what: str, size: int, count: int = 1) -> Communication:
    return Communication(kind, "tensor", phase, what, run.mp, 1, size, count)
