"""What a step's passes compute, move and communicate on one device, without regard to how fast."""

from dataclasses import dataclass

from research.telechat2.config.parallel import copies_of
from research.telechat2.plan.estimate.communication import (
    ALL_REDUCE,
    ALL_TO_ALL,
    FORWARD,
    SEND,
    Communication,
    micro_batch_communication,
    optimizer_communication,
)
from research.telechat2.plan.estimate.memory import stage_parameters
from research.telechat2.plan.estimate.workload import Workload

NODE = 8  # NPUs
PEAK = 313e12  # operations a second in bfloat16
MEMORY = 1.6e12  # bytes a second
HCCS_LINK = 28e9  # bytes a second and direction between two NPUs of a node
ROCE = 25e9  # bytes a second and direction from one NPU to other nodes


def link_seconds(item: Communication) -> float:
    """Of a collective at the links' full bandwidth, first across nodes and then within them.

    Ranks of a node use all links between them at once; across nodes each NPU has its own.
    """
    inside = max(min(item.ranks, NODE // item.stride), 1)
    nodes = item.ranks // inside
    if item.kind == SEND:
        return item.bytes / (HCCS_LINK if inside > 1 else ROCE)
    if item.kind == ALL_TO_ALL:
        each = item.tensor_bytes * item.count / item.ranks
        return max(each / HCCS_LINK if inside > 1 else 0.0, each * (item.ranks - inside) / ROCE)
    part = item.tensor_bytes * item.count / inside
    once = (part / HCCS_LINK if inside > 1 else 0.0) + part * (nodes - 1) / nodes / ROCE
    return once * (2 if item.kind == ALL_REDUCE else 1)


@dataclass(frozen=True)
class Cost:
    """Operations of matrix products, bytes read and written by all else, seconds on links at full speed."""

    flops: float
    moved: float
    links: float


@dataclass(frozen=True)
class StepCosts:
    """Of forward and backward passes with one micro-batch, ``[chunk][stage]``, and of each stage's update."""

    forward: list[list[Cost]]
    backward: list[list[Cost]]
    update: list[Cost]


def step_costs(run: Workload) -> StepCosts:
    """All costs of a step."""
    forward, backward = (
        [[_pass_cost(run, chunk, stage, way) for stage in range(run.pp)] for chunk in range(run.chunks)]
        for way in (True, False)
    )
    return StepCosts(forward, backward, [_update_cost(run, stage) for stage in range(run.pp)])


def _layer_operations(run: Workload) -> tuple[float, float, float]:
    """Operations of a layer's forward pass on a device with one micro-batch.

    Those of its matrix products, of attention, and of the products the share of w2. Rows that pad an expert's
    capacity are computed as well.
    """
    hidden, rows, parts = run.model.hidden_size, run.tokens, run.mp
    projections = 2 * rows * hidden * (2 * hidden + 2 * run.kv_size) / run.mp
    # Of devices that gather keys, those with a sequence's last tokens have the most to see; others wait.
    # Where documents have masks of their own and sequences are split, the whole square is computed.
    split = run.gather * run.exchange > 1
    square = 1.0 if run.model.document_start_ids and split else 1 - 0.5 / run.gather
    attention = 4 * run.tokens * run.model.seq_length * hidden * square / run.mp
    if run.model.moe:
        rows, parts = run.received_rows, run.width_parts
    product = 2 * rows * hidden * run.model.intermediate_size / parts
    return projections + 3 * product, attention, product


def _pass_cost(run: Workload, chunk: int, stage: int, forward: bool) -> Cost:
    products, attention, last_product = _layer_operations(run)
    layers, recomputed = run.layers[chunk][stage], run.recomputed[chunk][stage]
    if forward:
        flops = layers * (products + attention)
        moved = layers * _layer_bytes(run)
    else:  # FlashAttentionScoreGrad computes the scores again: five products against two
        flops = layers * (2 * products + 2.5 * attention)
        again = products + attention
        if not (run.model.moe and run.recomputes_outputs):  # what a layer returns is not needed again
            again -= last_product
        flops += recomputed * again
        moved = (2 * layers + recomputed) * _layer_bytes(run)
    if run.is_last(chunk, stage):
        parts = run.vocab_parts if run.vocab_parts > 1 else run.token_parts
        logits = run.tokens * run.model.vocab_size / parts
        flops += (2 if forward else 4) * logits * run.model.hidden_size
        # Forward: to float32, maxima, softmax, its logarithm; backward: the gradient and its cast.
        moved += logits * (run.compute_bytes + 5 * 4 if forward else run.compute_bytes + 3 * 4)
    copies = copies_of(run.model)
    links = sum(
        link_seconds(item) / (copies if item.group == "tensor" else 1)
        for item in micro_batch_communication(run, chunk, stage)
        if (item.phase == FORWARD) == forward
    )
    return Cost(flops, moved, links)


def _layer_bytes(run: Workload) -> float:
    """Bytes that the operators of a layer's forward pass read and write, matrix products and attention apart.

    Norms, residual sums with biases, rotating and transposing heads, and the gate; each operator reads its
    operands and writes its result once. The backward pass is taken for twice that.
    """
    number, stream = run.compute_bytes, run.residual_bytes
    hidden, parts = run.tokens * run.model.hidden_size, run.token_parts
    total = hidden * 2 * (stream + number) / parts  # norms
    total += hidden * 2 * (number + 2 * stream) / parts  # sums
    heads = run.tokens * (run.model.hidden_size + run.kv_size) / run.mp
    total += heads * 2 * number * 3  # transposed in and out, rotated
    gate = 7 * number  # stacked: two read and written, two read and one written
    moe = run.model.moe
    if moe is None:
        return total + gate * run.tokens * run.model.intermediate_size / run.mp
    total += gate * run.received_rows * run.model.intermediate_size / run.width_parts
    # From tokens to the block, then ordered by expert, and back.
    total += (run.expert_rows + run.received_rows) * run.model.hidden_size * 4 * number
    tokens = run.tokens / run.token_parts
    total += tokens * moe.top_k * run.model.hidden_size * 3 * number  # from the block to tokens
    return total + tokens * 4 * (2 * run.model.hidden_size + 8 * moe.top_k * moe.num_experts)


def _update_cost(run: Workload, stage: int) -> Cost:
    """Once a step: gradients and weights are communicated, and AdamW goes over what a device stores."""
    moved = 0
    for parameter in stage_parameters(run, stage):
        if parameter.trained:
            stored = parameter.bytes // parameter.number_bytes
            # Their norm, clipping, and AdamW's four tensors read and three written; all float32.
            moved += stored * 4 * (1 + 2 + 7)
            moved += parameter.computed_bytes + parameter.bytes  # to the compute dtype
            if run.micro_batches > 1:
                moved += run.micro_batches * 3 * parameter.slice_bytes
    return Cost(0, moved, sum(map(link_seconds, optimizer_communication(run, stage))))
