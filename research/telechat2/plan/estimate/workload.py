"""Workload: all that a run's memory, communication and speed depend on, read from its settings."""

from dataclasses import dataclass
from functools import cached_property

from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.table import ATTENTION_ROWS, DENSE_ROWS, MOE_ROWS, Row
from research.telechat2.common.errors import UsageError
from research.telechat2.config.check import check
from research.telechat2.config.parallel import copies_of, exchange_of
from research.telechat2.config.pipeline import partition_of
from research.telechat2.config.recompute import COMMUNICATION, SELECTED, read_recompute
from research.telechat2.config.sections import section_of
from research.telechat2.config.settings import DEFAULTS, model_config, with_defaults

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

Table = list[list[int]]


@dataclass(frozen=True)
class Workload:
    """A model, how it is split, and what is kept and what computed again.

    Sizes have TelechatConfig's names. Tables are ``[chunk][stage]``, numbers of layers.

    Attributes:
        parameter_bytes, embedding_bytes, norm_bytes, compute_bytes, residual_bytes: of one number.
        packed: documents have a mask of their own, so that attention computes its whole square.
        moe: MoESettings, None in a dense model.
        dp, mp, pp, ep: data, tensor, pipeline and expert parallel.
        gather, exchange: factors of context parallel: devices that gather the keys and values of a sequence,
            and devices that exchange heads for tokens.
        rows: sequences that a device computes at once.
        micro_batches: steps whose gradients are added up before the optimizer's.
        chunks: runs of layers of each stage.
        vocabulary: parts of embedding and output projection.
        shares_optimizer: the optimizer's work is shared out: of parameters of ``threshold`` bytes or more,
            among ``weight_shards`` of the ranks that have the same slice, or all of them (-1).
        gathers_again: weights are gathered a second time in the backward pass (level 3).
        fine_grain: copies whose communication and computation overlap; 1 for none.
        layers: of each chunk and stage. whole, selected, gathers: how many of them are computed again, have
            the feed-forward block's product computed again, and have their gathers done again.
        gathers_in_whole: layers that are computed again communicate again, instead of keeping the results.
        slice_kept: they keep their input split over the tensor-parallel ranks.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    n_kv_heads: int
    intermediate_size: int
    vocab_size: int
    seq_length: int
    tie_word_embeddings: bool
    parameter_bytes: int
    embedding_bytes: int
    norm_bytes: int
    compute_bytes: int
    residual_bytes: int
    packed: bool
    moe: object | None
    dp: int
    mp: int
    pp: int
    ep: int
    gather: int
    exchange: int
    rows: int
    micro_batches: int
    chunks: int
    sequence_parallel: bool
    vocabulary: int
    shares_optimizer: bool
    threshold: int
    weight_shards: int
    gathers_again: bool
    fine_grain: int
    layers: Table
    whole: Table
    selected: Table
    gathers: Table
    gathers_in_whole: bool
    slice_kept: bool

    @cached_property
    def dims(self) -> dict[str, int]:
        """The symbols in which the table of weights writes shapes."""
        return TelechatSizes(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            kv_size=self.kv_size,
            num_experts=self.moe.num_experts if self.moe else 0,
        ).dims()

    @property
    def layer_rows(self) -> tuple[Row, ...]:
        """Rows of the table of weights that each layer has."""
        return ATTENTION_ROWS + (MOE_ROWS if self.moe else DENSE_ROWS)

    @property
    def stage_devices(self) -> int:
        """NPUs of a stage of the pipeline."""
        return self.dp * self.gather * self.exchange * self.mp

    @property
    def devices(self) -> int:
        """NPUs of the cluster."""
        return self.stage_devices * self.pp

    @property
    def kv_size(self) -> int:
        """Width of all keys of a token."""
        return self.hidden_size // self.num_heads * self.n_kv_heads

    @property
    def tokens(self) -> int:
        """Tokens that the devices of a tensor-parallel group compute at once."""
        return self.rows * self.seq_length // (self.gather * self.exchange)

    @property
    def token_parts(self) -> int:
        """Parts into which sequence parallelism splits them outside of attention and feed-forward blocks."""
        return self.mp if self.sequence_parallel else 1

    @property
    def step_tokens(self) -> int:
        """Tokens of one step of the optimizer, on all devices."""
        return self.rows * self.seq_length * self.dp * self.micro_batches

    @property
    def extends(self) -> bool:
        """Whether tensor-parallel ranks have whole experts of their own."""
        return bool(self.moe) and self.moe.ep_extend_tp and self.sequence_parallel

    @property
    def owners(self) -> int:
        """Devices that share the experts out."""
        return self.ep * (self.mp if self.extends else 1)

    @property
    def width_parts(self) -> int:
        """Parts into which the width of a feed-forward block or of an expert is split."""
        return 1 if self.extends else self.mp

    @property
    def answers_again(self) -> bool:
        """Whether a mixture of experts that is computed again does its last product and exchange again, too.

        MindSpore does so in models that it compiles once for all micro-batches, and only there.
        """
        return self.pp > 1 or self.micro_batches > 1

    @property
    def expert_rows(self) -> int:
        """Rows that a device sends to all experts together, the padding of a capacity included.

        Without a capacity, those of all choices of its tokens.
        """
        if not self.moe.capacity_factor:
            return self.tokens // self.token_parts * self.moe.top_k
        return self.moe.num_experts * self.moe.capacity(self.tokens // self.token_parts)


def workload(settings: dict) -> Workload:
    """From the settings of ``read_settings``.

    Raises:
        UsageError: the plan is not legal, see check, or it asks for what is not estimated.
    """
    semi_auto = check(settings).kind == "semi_auto"
    plan = with_defaults(settings, "parallel_config") if semi_auto else DEFAULTS["parallel_config"]
    if plan["pipeline_stage"] > 1:
        plan = plan | {"vocab_emb_dp": False}  # as MindFormers does
    return of_config(model_config(settings, plan), settings)


def of_config(config, settings: dict) -> Workload:
    """From a config that obeys the rules, and what the settings say besides it."""
    plan, recompute = config.parallel_config, read_recompute(config)
    pipeline, mp = plan.pipeline_stage > 1, plan.model_parallel
    exchange = exchange_of(plan)
    accumulation = with_defaults(settings, "runner_config")["gradient_accumulation_steps"] or 1
    names = ("num_layers", "hidden_size", "num_heads", "n_kv_heads", "intermediate_size", "vocab_size",
             "seq_length", "tie_word_embeddings", "moe")  # fmt: skip
    return Workload(
        **{name: getattr(config, name) for name in names},
        parameter_bytes=_BYTES[config.param_init_type],
        embedding_bytes=_BYTES[config.embedding_init_type],
        norm_bytes=_BYTES[config.layernorm_compute_type],
        compute_bytes=_BYTES[config.compute_dtype],
        residual_bytes=_BYTES[config.res_dtype],
        packed=bool(config.document_start_ids) and plan.context_parallel > 1,
        dp=plan.data_parallel,
        mp=mp,
        pp=plan.pipeline_stage,
        ep=plan.expert_parallel,
        gather=plan.context_parallel // exchange,
        exchange=exchange,
        rows=config.batch_size,
        micro_batches=plan.micro_batch_num if pipeline else accumulation,
        chunks=config.pp_interleave_num,
        sequence_parallel=plan.use_seq_parallel and mp > 1,
        vocabulary=1 if plan.vocab_emb_dp else mp,
        **_sharing(settings),
        fine_grain=copies_of(config),
        layers=partition_of(config),
        whole=recompute.whole,
        selected=_built_in("select_recompute", recompute.selected, SELECTED),
        gathers=_built_in("select_comm_recompute", recompute.communication, COMMUNICATION),
        gathers_in_whole=plan.recompute.mp_comm_recompute,
        slice_kept=plan.recompute.recompute_slice_activation,
    )


def _sharing(settings: dict) -> dict:
    """How the optimizer's work is shared out."""
    options = section_of(settings, "parallel.parallel_optimizer_config")
    level = options.get("optimizer_level", "level1")
    if options.get("gradient_accumulation_shard") or level not in ("level1", "level3"):
        raise UsageError(
            f"parallel.parallel_optimizer_config has optimizer_level {level} and gradient_accumulation_shard "
            f"{options.get('gradient_accumulation_shard')}; the estimate knows level1 and level3 without "
            "shared accumulation. Set one of them, or ask for --dry_run."
        )
    return {
        "shares_optimizer": bool(section_of(settings, "parallel").get("enable_parallel_optimizer")),
        "threshold": options.get("parallel_optimizer_threshold", 64) * 1024,
        "weight_shards": options.get("optimizer_weight_shard_size", -1),
        "gathers_again": level == "level3",
    }


def _built_in(name: str, tables: dict[str, Table], pattern: str) -> Table:
    if list(tables) != [pattern]:
        raise UsageError(
            f"recompute_config.{name} names operators of its own; the estimate knows the built-in choice. "
            "Use True or numbers of layers, or ask for --dry_run."
        )
    return tables[pattern]
