"""Workload: all that a run's memory, communication and speed depend on, read from its settings."""

from dataclasses import dataclass
from functools import cached_property

from research.telechat2.checkpoint.sizes import sizes_of_model
from research.telechat2.checkpoint.table import ATTENTION_ROWS, DENSE_ROWS, MOE_ROWS, Row
from research.telechat2.common.dtypes import WIDTH
from research.telechat2.common.errors import UsageError
from research.telechat2.config.check import check
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.parallel import exchange_of
from research.telechat2.config.pipeline import partition_of
from research.telechat2.config.recompute import COMMUNICATION, SELECTED, read_recompute
from research.telechat2.config.sections import Settings, section_of
from research.telechat2.config.settings import DEFAULTS, model_config, with_defaults

Table = list[list[int]]


@dataclass(frozen=True)
class Workload:
    """A model, how it is sharded, and what is kept and what recomputed.

    Tables are ``[chunk][stage]``, numbers of layers.

    Attributes:
        compute_bytes, residual_bytes: of one number.
        dp, mp, pp, ep: data, tensor, pipeline and expert parallel.
        gather, exchange: factors of context parallel: devices that gather the keys and values of a sequence,
            and devices that exchange heads for tokens.
        micro_batches: steps whose gradients are accumulated before the optimizer's.
        chunks: runs of layers of each stage.
        vocab_parts: of embedding and output projection.
        shards_optimizer: parameters of ``shard_threshold`` bytes or more are sharded among
            ``optimizer_shards`` of the ranks that have the same slice, or all of them (-1).
        regathers_weights: weights are gathered a second time in the backward pass (level 3).
        layers: of each chunk and stage. recomputed, selected, regathered: how many of them are recomputed as
            a whole, have the feed-forward block's product recomputed, and have their all-gathers repeated.
    """

    model: ModelSettings
    compute_bytes: int
    residual_bytes: int
    dp: int
    mp: int
    pp: int
    ep: int
    gather: int
    exchange: int
    micro_batches: int
    chunks: int
    sequence_parallel: bool
    vocab_parts: int
    shards_optimizer: bool
    shard_threshold: int
    optimizer_shards: int
    regathers_weights: bool
    layers: Table
    recomputed: Table
    selected: Table
    regathered: Table

    @cached_property
    def dims(self) -> dict[str, int]:
        """The symbols in which the table of weights writes shapes."""
        return sizes_of_model(self.model).dims()

    @property
    def layer_rows(self) -> tuple[Row, ...]:
        """Rows of the table of weights that each layer has."""
        return ATTENTION_ROWS + (MOE_ROWS if self.model.moe else DENSE_ROWS)

    @property
    def stage_devices(self) -> int:
        return self.dp * self.gather * self.exchange * self.mp

    @property
    def devices(self) -> int:
        return self.stage_devices * self.pp

    def is_last(self, chunk: int, stage: int) -> bool:
        """Whether a chunk of a stage has the output projection and the loss."""
        return chunk == self.chunks - 1 and stage == self.pp - 1

    @property
    def kv_size(self) -> int:
        """Width of all keys of a token."""
        return self.model.head_dim * self.model.n_kv_heads

    @property
    def tokens(self) -> int:
        """Tokens that the devices of a tensor-parallel group compute at once."""
        return self.model.batch_size * self.model.seq_length // (self.gather * self.exchange)

    @property
    def token_parts(self) -> int:
        """Parts into which sequence parallelism splits them outside of attention and feed-forward blocks."""
        return self.mp if self.sequence_parallel else 1

    @property
    def step_tokens(self) -> int:
        """Tokens of one step of the optimizer, on all devices."""
        return self.model.batch_size * self.model.seq_length * self.dp * self.micro_batches

    @property
    def experts_over_tp(self) -> bool:
        """Whether tensor-parallel ranks have whole experts of their own."""
        return self.model.moe is not None and self.model.moe.ep_extend_tp and self.sequence_parallel

    @property
    def expert_ranks(self) -> int:
        return self.ep * (self.mp if self.experts_over_tp else 1)

    @property
    def width_parts(self) -> int:
        """Parts into which the width of a feed-forward block or of an expert is split."""
        return 1 if self.experts_over_tp else self.mp

    @property
    def recomputes_outputs(self) -> bool:
        """Whether recomputed experts repeat their last product and exchange, too.

        MindSpore does so in models that it compiles once for all micro-batches, and only there.
        """
        return self.pp > 1 or self.micro_batches > 1

    @property
    def expert_rows(self) -> int:
        """Rows that a device sends to all experts together, the padding of a capacity included.

        Without a capacity, those of all choices of its tokens. 0 in a dense model.
        """
        if self.model.moe is None:
            return 0
        tokens = self.tokens // self.token_parts
        if not self.model.moe.capacity_factor:
            return tokens * self.model.moe.top_k
        return self.model.moe.num_experts * self.model.moe.capacity(tokens)

    @property
    def received_rows(self) -> int:
        """Rows for which a device's experts, or parts of experts, compute."""
        return self.expert_rows * (self.mp if self.width_parts > 1 and self.sequence_parallel else 1)


def workload(settings: Settings) -> Workload:
    """From the settings of ``read_settings``; UsageError: not legal, or not estimated."""
    semi_auto = check(settings).kind == "semi_auto"
    plan = with_defaults(settings, "parallel_config") if semi_auto else DEFAULTS["parallel_config"]
    if plan["pipeline_stage"] > 1:
        plan = plan | {"vocab_emb_dp": False}  # as MindFormers does
    return workload_of(model_config(settings, plan), settings)


def workload_of(model: ModelSettings, settings: Settings) -> Workload:
    """Of a model that obeys the rules, and what the settings say besides it."""
    plan, recompute = model.parallel_config, read_recompute(model)
    mp, exchange = plan.model_parallel, exchange_of(plan)
    accumulation = with_defaults(settings, "runner_config")["gradient_accumulation_steps"] or 1
    options = _optimizer_options(settings)
    return Workload(
        model=model,
        compute_bytes=WIDTH[model.compute_dtype],
        residual_bytes=WIDTH[model.res_dtype],
        dp=plan.data_parallel,
        mp=mp,
        pp=plan.pipeline_stage,
        ep=plan.expert_parallel,
        gather=plan.context_parallel // exchange,
        exchange=exchange,
        micro_batches=plan.micro_batch_num if plan.pipeline_stage > 1 else accumulation,
        chunks=model.pp_interleave_num,
        sequence_parallel=plan.use_seq_parallel and mp > 1,
        vocab_parts=1 if plan.vocab_emb_dp else mp,
        shards_optimizer=bool(section_of(settings, "parallel").get("enable_parallel_optimizer")),
        shard_threshold=options.get("parallel_optimizer_threshold", 64) * 1024,
        optimizer_shards=options.get("optimizer_weight_shard_size", -1),
        regathers_weights=options.get("optimizer_level") == "level3",
        layers=partition_of(model),
        recomputed=recompute.whole,
        selected=_built_in("select_recompute", recompute.selected, SELECTED),
        regathered=_built_in("select_comm_recompute", recompute.communication, COMMUNICATION),
    )


def _optimizer_options(settings: Settings) -> Settings:
    options = section_of(settings, "parallel.parallel_optimizer_config")
    level = options.get("optimizer_level", "level1")
    sharded = options.get("gradient_accumulation_shard")
    if sharded or level not in ("level1", "level3"):
        raise UsageError(
            f"parallel.parallel_optimizer_config has optimizer_level {level} and gradient_accumulation_shard "
            f"{sharded}; the estimate knows level1 and level3 without that. Set them, or use --dry_run."
        )
    return options


def _built_in(name: str, tables: dict[str, Table], pattern: str) -> Table:
    if list(tables) != [pattern]:
        raise UsageError(
            f"recompute_config.{name} names operators, but the estimate knows True and numbers of layers. "
            "Set one of these, or use --dry_run."
        )
    return tables[pattern]
