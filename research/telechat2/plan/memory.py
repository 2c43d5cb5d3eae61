"""What a device of a stage stores: parameters, gradients and optimizer to the byte, activations by formula.

The activations are what the operators of a layer need again in the backward pass, counted as Korthikanti et
al. 2022 (Reducing Activation Recomputation in Large Transformer Models, section 4) count them, for the
operators and dtypes here: SwiGLU, a flash attention that keeps no scores, a residual stream of its own dtype.
"""

from dataclasses import asdict, dataclass
from math import prod

from research.telechat2.plan.parameters import stage_parameters
from research.telechat2.plan.schedule import Schedule
from research.telechat2.plan.workload import Workload

STATISTICS = (
    2 * 8 * 4
)  # bytes for each head and token: FlashAttentionScore's maxima and sums, eight times each
SCORES = 4  # of a logit in the loss: float32


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
