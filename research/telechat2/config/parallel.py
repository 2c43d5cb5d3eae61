"""What a TelechatConfig's ``parallel_config`` may ask for: all that can be checked without a cluster."""

import operator

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.fields import check_section
from research.telechat2.config.kinds import check_divisible
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.pipeline import partition_of
from research.telechat2.config.plan_settings import ParallelSettings, RecomputeSettings, SwapSettings
from research.telechat2.config.rank_groups import check_groups
from research.telechat2.config.recompute import SELECTED, read_recompute


def check_plan(config: ModelSettings) -> None:
    """UsageError for sizes that do not divide, an impossible pipeline, or an option without effect."""
    section = config.parallel_config
    check_all(
        (check_section, section, ParallelSettings),
        (check_section, section.recompute, RecomputeSettings),
        (check_section, section.swap, SwapSettings),
        (_check_one_sequence, config, section),
        (_check_model_parallel, config, section),
        (_check_context_parallel, config, section),
        (_check_prediction if config.use_past else _check_experts, config, section),
        (_check_interleave, config, section),
        (_check_pipeline, config, section),
        (_check_recompute, config, section.recompute),
    )


def check_cluster(config: ModelSettings, devices: int, gradients_mean: bool) -> None:
    """Refuse to share one graph out to ``devices`` where plan or context do not fit.

    Raises:
        UsageError: another number of devices than the plan's or MindSpore's, groups of ranks that nodes do
            not have, gradients that would be averaged twice, or attention that cannot be split.
    """
    section = config.parallel_config
    product = devices_of(section)
    if product != devices:
        names = ["data_parallel", "context_parallel", "model_parallel", "pipeline_stage"]
        if section.context_parallel == 1:
            names.remove("context_parallel")
        factors = " times ".join(f"{name} {getattr(section, name)}" for name in names)
        raise UsageError(f"{factors} is {product}, but {devices} devices take part; make them equal.")
    if devices % 8 and devices not in (1, 2, 4):
        raise UsageError(
            f"{devices} devices take part, but MindSpore's graphs take 1, 2, 4 or a multiple of 8; choose "
            "data_parallel, model_parallel and pipeline_stage so."
        )
    exchange = exchange_of(section)
    gather = section.context_parallel // exchange
    check_groups(section.data_parallel, section.model_parallel, section.pipeline_stage, gather, exchange)
    if gradients_mean:
        raise UsageError(
            "parallel.gradients_mean is True, which divides gradients of a mean once more; set it to False."
        )
    if not config.use_flash_attention:
        raise UsageError(
            "use_flash_attention is False, but only fused attention is split over devices; set "
            "model_config.use_flash_attention: True, or use_parallel: False."
        )


def devices_of(section: ParallelSettings) -> int:
    """How many devices a ``parallel_config`` takes."""
    context = section.context_parallel
    return section.data_parallel * context * section.model_parallel * section.pipeline_stage


def exchange_of(section: ParallelSettings) -> int:
    """How many devices exchange heads for tokens (Ulysses); the other factor of ``context_parallel`` gathers.

    By ``context_parallel_algo``: ``colossalai_cp`` gathers only, ``ulysses_cp`` exchanges only, ``hybrid_cp``
    has ``ulysses_degree_in_cp`` devices exchange.
    """
    algorithm = _algorithm(section)
    if section.context_parallel == 1 or algorithm == "colossalai_cp":
        return 1
    return section.context_parallel if algorithm == "ulysses_cp" else section.ulysses_degree_in_cp


def check_exchange(config: ModelSettings, enable_alltoall: bool) -> None:
    """UsageError if MindSpore's context forbids the exchange that the plan asks for."""
    exchange = exchange_of(config.parallel_config)
    if exchange > 1 and not enable_alltoall:
        raise UsageError(
            f"parallel_config.context_parallel_algo {_algorithm(config.parallel_config)} has {exchange} "
            "devices exchange heads, but parallel.enable_alltoall is False; set it to True."
        )


def _algorithm(section: ParallelSettings) -> str:
    """MindFormers' enumeration, or the text of a YAML."""
    return str(getattr(section.context_parallel_algo, "value", section.context_parallel_algo))


def _check_context_parallel(config: ModelSettings, section: ParallelSettings) -> None:
    context, algorithm, degree = section.context_parallel, _algorithm(section), section.ulysses_degree_in_cp
    if context == 1:
        return
    name = f"parallel_config.context_parallel {context}"
    if degree > 1 and algorithm != "hybrid_cp":
        raise UsageError(
            f"parallel_config.ulysses_degree_in_cp {degree} is not read by context_parallel_algo "
            f"{algorithm}; set context_parallel_algo: hybrid_cp, or remove it."
        )
    check_divisible("parallel_config.context_parallel", context, "ulysses_degree_in_cp", degree)
    check_divisible("seq_length", config.seq_length, "parallel_config.context_parallel", context)
    if config.batch_size > 1:
        raise UsageError(
            f"batch_size is {config.batch_size}, but {name} splits one sequence; set batch_size to 1, and "
            "gradient_accumulation_steps or micro_batch_num higher."
        )
    if config.moe:
        raise UsageError(f"{name} splits sequences, but experts take whole ones; use model_parallel instead.")
    exchange = exchange_of(section)
    by = f"model_parallel {section.model_parallel} times {exchange} devices that exchange heads ="
    advice = "let fewer exchange by hybrid_cp and ulysses_degree_in_cp, or none by colossalai_cp"
    for heads in ("num_heads", "n_kv_heads"):
        check_divisible(heads, getattr(config, heads), by, section.model_parallel * exchange, advice)


def _check_one_sequence(config: ModelSettings, section: ParallelSettings) -> None:
    if config.use_past and section.pipeline_stage * section.context_parallel > 1:
        raise UsageError(
            f"use_past is True, context_parallel {section.context_parallel}, pipeline_stage "
            f"{section.pipeline_stage}; prediction with a cache splits by model_parallel only. Set them to 1."
        )


def _check_model_parallel(config: ModelSettings, section: ParallelSettings) -> None:
    mp = section.model_parallel
    sizes = ["num_heads", "n_kv_heads"]
    if config.use_past or not (config.moe and config.moe.ep_extend_tp):
        sizes.append("intermediate_size")
    if not section.vocab_emb_dp:
        sizes.append("vocab_size")
    for name in sizes:
        advice = "change one of them" + (", or set vocab_emb_dp: True" if name == "vocab_size" else "")
        check_divisible(name, getattr(config, name), "parallel_config.model_parallel", mp, advice)
    if section.use_seq_parallel:
        context = section.context_parallel
        by = "parallel_config.model_parallel"
        by += f" {mp} times context_parallel {context} =" if context > 1 else ""
        advice = "change one of them, or set use_seq_parallel: False"
        check_divisible(_tokens(config), config.batch_size * config.seq_length, by, mp * context, advice)


def _tokens(config: ModelSettings) -> str:
    return f"batch_size {config.batch_size} times seq_length {config.seq_length} ="


def check_whole(config: ModelSettings) -> None:
    """UsageError if ``model_parallel`` or ``qkv_concat`` ask for ParallelTelechatForCausalLM."""
    mp = config.parallel_config.model_parallel
    if config.qkv_concat or (config.use_past and mp > 1):
        raise UsageError(
            f"TelechatForCausalLM has no qkv_concat {config.qkv_concat} with use_past {config.use_past} and "
            f"parallel_config.model_parallel {mp}; set model.arch.type: ParallelTelechatForCausalLM, or "
            "qkv_concat: False and model_parallel: 1."
        )


def _check_prediction(config: ModelSettings, section: ParallelSettings) -> None:
    """Refuse what prediction with a cache would have to ignore: tensor parallelism is all there is."""
    if section.expert_parallel > 1:
        raise UsageError(
            f"use_past is True and parallel_config.expert_parallel {section.expert_parallel}; prediction "
            "splits experts by model_parallel. Set expert_parallel to 1."
        )
    if section.model_parallel == 1:
        return
    if section.use_seq_parallel:
        raise UsageError(
            "use_past and parallel_config.use_seq_parallel are True; set use_seq_parallel: False to predict."
        )
    if section.vocab_emb_dp:
        raise UsageError(
            f"use_past is True, parallel_config.model_parallel {section.model_parallel} and vocab_emb_dp "
            "True (as if not set), but prediction splits the vocabulary; set vocab_emb_dp: False."
        )


def _check_experts(config: ModelSettings, section: ParallelSettings) -> None:
    mp, ep, dp = section.model_parallel, section.expert_parallel, section.data_parallel
    if not config.moe:
        if ep > 1:
            raise UsageError(
                f"parallel_config.expert_parallel is {ep}, but there are no experts; set it to 1."
            )
        return
    check_divisible("parallel_config.data_parallel", dp, "expert_parallel", ep)
    extend = config.moe.ep_extend_tp and mp > 1
    if extend and not section.use_seq_parallel:
        raise UsageError(
            f"moe_config.ep_extend_tp is True, model_parallel {mp} and use_seq_parallel False; set "
            "use_seq_parallel: True, or ep_extend_tp: False."
        )
    if mp > 1 and not extend and config.moe.capacity_factor <= 0:
        raise UsageError(
            f"moe_config.capacity_factor {config.moe.capacity_factor} needs whole experts, but "
            f"model_parallel {mp} splits them. Set ep_extend_tp: True with use_seq_parallel: True, or "
            "model_parallel: 1, or a capacity_factor above 0."
        )
    by = f"expert_parallel {ep} times model_parallel {mp} =" if extend else "expert_parallel"
    check_divisible("moe_config.expert_num", config.moe.num_experts, by, ep * mp if extend else ep)


def copies_of(config: ModelSettings) -> int:
    """In how many copies of the tokens a TelechatConfig's layers are computed; 1 for plain layers.

    Copies hide the communication of tensor parallelism; without it, and with a cache, there is one.
    """
    section = config.parallel_config
    return 1 if section.model_parallel == 1 or config.use_past else config.fine_grain_interleave


def _check_interleave(config: ModelSettings, section: ParallelSettings) -> None:
    if config.moe and config.fine_grain_interleave > 1:
        raise UsageError(
            f"fine_grain_interleave is {config.fine_grain_interleave}, but the layers have experts, which "
            "count all tokens; set it to 1."
        )
    copies = copies_of(config)
    if copies > 1 and section.context_parallel > 1:
        raise UsageError(
            f"fine_grain_interleave {copies} needs whole sequences, which parallel_config.context_parallel "
            f"{section.context_parallel} splits; set one of them to 1."
        )
    if copies > 2:
        raise UsageError(
            f"fine_grain_interleave is {copies}; MindSpore overlaps two copies at most. Set 2 or 1."
        )
    if copies > 1:
        devices = section.model_parallel if section.use_seq_parallel else 1
        by = f"fine_grain_interleave {copies} times {devices} devices that share the tokens ="
        advice = "change one of them, or set fine_grain_interleave to 1"
        check_divisible(_tokens(config), config.batch_size * config.seq_length, by, copies * devices, advice)


def _check_pipeline(config: ModelSettings, section: ParallelSettings) -> None:
    stages, chunks = section.pipeline_stage, config.pp_interleave_num
    if chunks > 1 and stages == 1:
        raise UsageError(
            f"pp_interleave_num is {chunks} and parallel_config.pipeline_stage 1; set pp_interleave_num to 1."
        )
    partition_of(config)
    if stages == 1:
        return
    if chunks > 1 and config.disable_lazy_inline:
        raise UsageError(
            f"disable_lazy_inline is True, but pp_interleave_num {chunks} needs lazy inlining; remove it."
        )
    if section.micro_batch_num < stages:
        raise UsageError(
            f"parallel_config.micro_batch_num is {section.micro_batch_num}, less than pipeline_stage "
            f"{stages}; raise it."
        )
    if config.tie_word_embeddings:
        raise UsageError(
            f"tie_word_embeddings is True, but parallel_config.pipeline_stage {stages} puts embedding and "
            "output projection on two stages; set pipeline_stage to 1, or tie_word_embeddings to False."
        )


def _check_recompute(config: ModelSettings, recompute: RecomputeSettings) -> None:
    tables = read_recompute(config)
    selected, whole = sum(tables.selected.get(SELECTED, []), []), sum(tables.whole, [])
    if config.moe and any(map(operator.gt, selected, whole)):  # layers that are recomputed in part only
        raise UsageError(
            f"recompute_config.select_recompute {recompute.select_recompute} chooses operators of dense "
            "layers, but the layers have experts; set it to False, and choose whole layers by recompute."
        )
