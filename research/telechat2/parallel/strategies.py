"""Every strategy of a parallel plan, and what data-parallel processes share. A plan changes no number.

In semi-automatic parallelism one graph is written for the whole cluster, and each operator is told how many
times each axis of its operands is split. Operators that are told nothing, such as casts, follow the others.

Axes: B sequences, S tokens of each, T tokens of all, H channels, F width of the feed-forward block, V
vocabulary, N heads. ``dp``, ``cp`` and ``mp`` are ``data_parallel``, ``context_parallel`` and
``model_parallel``; devices are numbered in that order, ``mp`` fastest.

Context parallelism splits sequences. All but attention works on tokens alone, as if ``dp`` were ``dp * cp``.
For attention a device either gathers the keys and values of the whole sequence, or it gives away tokens of
most of its heads for those that others have of the rest (Ulysses: ``exchange`` devices do that), or both.
"""

from dataclasses import dataclass

import mindspore as ms
from mindspore.parallel import Layout

from research.telechat2.config.parallel import check_cluster, check_exchange, exchange_of
from research.telechat2.parallel.experts import ExpertPlan, shard_experts
from research.telechat2.parallel.pipeline import assign_stages
from research.telechat2.parallel.recompute import recompute_layers


@dataclass(frozen=True)
class Plan:
    """How often axes are split.

    Attributes:
        dp: the batch, and with it the tokens.
        mp: heads, and the width of the feed-forward block.
        gather, exchange: factors of ``cp``, see above.
        rows: the tokens, ``dp * cp``.
        tokens: the tokens outside of attention and feed-forward blocks; ``rows * mp`` with sequence
            parallelism.
        vocabulary: rows of the embedding and the output projection.
        packed: records have documents that do not see each other.
        variable_length: attention takes their cumulative lengths, not a mask for each record.
        experts: where they lie; None for a dense model.
    """

    dp: int
    mp: int
    gather: int
    exchange: int
    rows: int
    tokens: int
    vocabulary: int
    packed: bool
    variable_length: bool
    experts: ExpertPlan | None

    @classmethod
    def read(cls, config, kernels) -> "Plan":
        """From MindFormers' section ``parallel_config``, and the kernels of the model."""
        section = config.parallel_config
        dp, mp = section.data_parallel, section.model_parallel
        exchange = exchange_of(section)
        gather = section.context_parallel // exchange
        rows = dp * section.context_parallel
        tokens = rows * mp if section.use_seq_parallel else rows
        vocabulary = 1 if section.vocab_emb_dp else mp
        packed = bool(config.document_start_ids)
        return cls(
            dp, mp, gather, exchange, rows, tokens, vocabulary, packed, kernels.has_variable_length(config),
            _expert_plan(config),
        )  # fmt: skip


def _expert_plan(config) -> ExpertPlan | None:
    if not config.moe:
        return None
    section = config.parallel_config
    return ExpertPlan(
        replicas=section.data_parallel // section.expert_parallel,
        expert_parallel=section.expert_parallel,
        model_parallel=section.model_parallel,
        ep_extend_tp=config.moe.ep_extend_tp and section.use_seq_parallel,
        sequence_parallel=section.use_seq_parallel,
        rank=ms.communication.get_rank(),
    )


def is_semi_auto() -> bool:
    """Whether one graph is compiled for the whole cluster, so that operators need strategies."""
    return ms.get_auto_parallel_context("parallel_mode") == "semi_auto_parallel"


def apply_plan(model, config) -> None:
    """Make a TelechatForCausalLM follow the config's plan: recompute, and on a cluster strategies and stages.

    Raises:
        UsageError: MindSpore's context does not fit the plan, or see recompute_layers.
    """
    if config.use_past:
        return  # prediction with a cache is not split, see check_plan
    recompute_layers(model, config)
    if not is_semi_auto():
        return
    check_cluster(config, ms.communication.get_group_size(), ms.get_auto_parallel_context("gradients_mean"))
    check_exchange(config, ms.get_auto_parallel_context("enable_alltoall"))
    plan = Plan.read(config, model.kernels)
    shard_inputs(model, plan)
    if model.model.packed:
        shard_documents(model.model.documents, plan)
    shard_embedding(model.model.tok_embeddings, plan)
    shard_copies(model.model, plan)
    for layer in model.model.layers:
        shard_layer(layer, plan)
    model.model.add.shard(((1,), (1,)))
    shard_norm(model.model.norm_out, plan)
    shard_output(model, plan)
    assign_stages(model, config)
    fuse_gradients(model, config)
    compile_once(model, config)


def compile_once(model, config) -> None:
    """Have MindSpore compile the model once for all micro-batches, not once for each.

    As its decorator ``lazy_inline`` does; virtual chunks demand it. The graph communicates the same, but for
    a single micro-batch, where it would gather the optimizer's shards before they are cast.
    """
    if not config.disable_lazy_inline:
        model.cell_init_args = f"lazy_inline_{type(model).__name__}"


def fuse_gradients(model, config) -> None:
    """Group what the optimizer communicates: a pipeline's stage as one, else by runs of layers.

    Norms and biases are too small to be shared between optimizers' shards.
    """
    section, layers = config.parallel_config, model.model.layers
    size = max((len(layers) + 1) // section.gradient_aggregation_group, 1)
    pipeline = section.pipeline_stage > 1
    for index, layer in enumerate(layers):
        layer.set_comm_fusion(2 if pipeline else index // size + 1)
    for parameter in model.trainable_params():
        if len(parameter.shape) == 1:
            parameter.parallel_optimizer = False


def shard_inputs(model, plan: Plan) -> None:
    """Ids and labels ``[B, S + 1]``, of which every device has those of its rows."""
    rows = (plan.dp, 1)
    model.slice.shard((rows,))
    model.not_equal.shard((rows, ()))


def shard_documents(cell, plan: Plan) -> None:
    """The documents' cumulative lengths, or their mask ``[B, 1, S, S]``: each row on its device."""
    dp = plan.dp
    numbers = cell.documents
    numbers.equal.shard(((dp, 1, 1), (1, 1, 1)))
    numbers.sum.shard(((dp, 1, 1),))
    for operator in (numbers.cumsum, numbers.slice):
        operator.shard(((dp, 1),))
    numbers.sub.shard(((dp, 1), (dp, 1)))
    if plan.variable_length:
        cell.parts = dp
        cell.beyond.shard(((dp, 1, 1), (1, 1, 1)))
        cell.sum.shard(((dp, 1),))
        cell.sub.shard(((dp,), (dp,)))
        return
    cell.different.shard(((dp, 1, plan.gather, 1), (dp, 1, 1, 1)))
    cell.later.shard(((1, 1, 1, 1), (1, 1, plan.gather, 1)))
    cell.either.shard(((dp, 1, plan.gather, 1), (1, 1, plan.gather, 1)))


def shard_embedding(cell, plan: Plan) -> None:
    """Rows of the table by vocabulary; each device contributes the tokens that it holds."""
    if plan.vocabulary > 1:
        cell.gather.shard(((plan.vocabulary, 1), (plan.rows,)), ((plan.tokens, 1),))
    else:
        cell.gather.shard(((1, 1), (plan.tokens,)))
    cell.dropout.dropout.shard(((plan.tokens, 1),))


def shard_layer(layer, plan: Plan) -> None:
    """A decoder layer; outside of its two blocks it works on ``tokens`` parts."""
    tokens = (plan.tokens, 1)
    shard_norm(layer.attention_norm, plan)
    shard_attention(layer.attention, plan)
    shard_norm(layer.ffn_norm, plan)
    if layer.has_experts:
        shard_experts(layer.feed_forward, plan.experts)
    else:
        shard_feed_forward(layer.feed_forward, plan)
    layer.add_attention.shard((tokens, tokens))
    layer.add_feed_forward.shard((tokens, tokens))


def shard_copies(model, plan: Plan) -> None:
    """Of a TelechatModel with interleaved layers: each device cuts and joins the tokens that it holds."""
    if not model.interleaved:
        return
    _keep_local(model.split_tokens.slice, (plan.dp,))
    copies = model.split_tokens.copies
    heads, tokens = (plan.dp, plan.mp), (plan.tokens, 1)
    _keep_local(model.join_embedded.concat, *[tokens] * copies)
    _keep_local(model.split_hidden.slice, tokens)
    # The output projection and the loss take each device's tokens in their order.
    _keep_local(model.join_hidden.concat, *[(plan.dp, 1)] * copies)
    for layer in model.layers:
        for cell in (layer.join_query, layer.join_key_value):
            _keep_local(cell.concat, *[heads] * copies)
        _keep_local(layer.split_attention.slice, heads)
        if layer.splits:
            _keep_local(layer.split_stage.slice, tokens)
        if layer.joins:
            _keep_local(layer.join_stage.concat, *[tokens] * copies)


def _keep_local(operator, *strategies) -> None:
    """Have an operator work on the axis that is split, on each device's part of it."""
    operator.shard(strategies)
    operator.add_prim_attr("skip_redistribution", True)


def shard_norm(cell, plan: Plan) -> None:
    """RMSNorm, each token on its device."""
    cell.norm.norm.shard(((plan.tokens, 1), (1,)))


def shard_attention(cell, plan: Plan) -> None:
    """Heads are split: the projections before by columns, the one after by rows."""
    split_columns(cell.wq, plan)
    split_columns(cell.wk_v, plan)
    positions = plan.gather * plan.exchange
    tokens = (plan.dp, positions, plan.mp, 1)
    cell.split_kv.shard((tokens,))
    table = (1, positions, 1, 1)
    cell.rotary.rotary.shard((tokens, table, table))
    if plan.variable_length:
        heads, lengths = (plan.dp, plan.mp, 1), (plan.dp,)
        cell.causal_attention.flash.shard((heads, heads, heads, (1, 1), lengths, lengths))
    else:
        shard_heads(cell.causal_attention, plan)
    split_rows(cell.wo, plan)


def shard_heads(cell, plan: Plan) -> None:
    """The kernel on ``[B, N, S, D]``, and the transpositions of its operands and its result.

    The layouts are named, since by numbers alone MindSpore would take devices for numbered in the order of
    the axes.
    """
    for transpose in (cell.transpose_q, cell.transpose_kv):
        transpose.shard(((plan.dp, plan.gather * plan.exchange, plan.mp, 1),))
    layout = Layout((plan.dp, plan.gather, plan.exchange, plan.mp), ("dp", "gather", "exchange", "mp"))
    query = layout("dp", ("mp", "exchange"), "gather", "None")
    key = layout("dp", ("mp", "exchange"), "None", "None")
    mask = layout("dp", "None", "gather", "None") if plan.packed else layout("None", "None")
    cell.kernel.flash.shard((query, key, key, mask))
    cell.transpose_out.shard((layout("dp", "mp", ("gather", "exchange"), "None"),))


def shard_feed_forward(cell, plan: Plan) -> None:
    """The width is split: w1 and w3 by columns, w2 by rows."""
    split_columns(cell.w1, plan)
    split_columns(cell.w3, plan)
    cell.swiglu.stack.shard(((plan.rows, plan.mp), (plan.rows, plan.mp)))
    cell.swiglu.swiglu.shard(((plan.rows, 1, plan.mp),))
    split_rows(cell.w2, plan)


def split_columns(linear, plan: Plan) -> None:
    """``[T, in]`` whole to ``[T, out]`` split: the rows of the weight ``[out, in]`` are."""
    linear.matmul.shard(((plan.rows, 1), (plan.mp, 1)))
    linear.dropout.dropout.shard(((plan.rows, plan.mp),))


def split_rows(linear, plan: Plan) -> None:
    """``[T, in]`` split to ``[T, out]``: the devices' products are added up, and then the bias to the sum."""
    tokens = (plan.tokens, 1)
    linear.matmul.shard(((plan.rows, plan.mp), (1, plan.mp)), (tokens,))
    linear.bias_add.shard((tokens, (1,)))
    linear.dropout.dropout.shard((tokens,))


def shard_output(model, plan: Plan) -> None:
    """Output projection and loss, split by vocabulary; a whole vocabulary by tokens only."""
    rows = plan.rows if plan.vocabulary > 1 else plan.tokens
    model.lm_head.matmul.shard(((rows, 1), (plan.vocabulary, 1)))
    model.lm_head.dropout.dropout.shard(((rows, plan.vocabulary),))
    model.loss = model.kernels.cross_entropy(rows, plan.vocabulary)
    model.add.shard(((1,), (1,)))
