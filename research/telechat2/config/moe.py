"""The section ``moe_config``: every key of MindFormers, what TeleChat2 takes of it, and what it refuses."""

import math
from dataclasses import dataclass
from fractions import Fraction

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all
from research.telechat2.config.fields import Section, only, setting, settings_of
from research.telechat2.config.kinds import check_number


@dataclass
class ExpertSection(Section):
    """moe_config"""

    expert_num: int = setting(1, "Experts of each layer; 1: a dense model.", least=1)
    num_experts_chosen: int = setting(1, "Experts that each token is sent to.", least=1)
    capacity_factor: float = setting(
        1.1, "An expert takes that many times its even share of tokens in training; 0 or less: all."
    )
    enable_sdrop: bool = setting(False, "Drop tokens by their place instead of by choices; see MoESettings.")
    aux_loss_types: list[str] | None = setting(None, "['expert'], the one auxiliary loss, or null.")
    aux_loss_factors: list[float] | None = setting(None, "Its factor, as [0.01].")
    ep_extend_tp: bool = setting(True, "Tensor-parallel ranks are expert-parallel ranks inside the block.")
    router_dense_type: str = setting("float32", "The router is computed in float32.")
    first_k_dense_replace: bool | int = setting(True, "Every layer has experts.", choices=(True, False))
    moe_intermediate_size: int = setting(1407, "Not read: an expert's width is `intermediate_size`.")
    aux_loss_factor: float = setting(0.05, "Not read; `aux_loss_factors` has the factor.", choices=(0.05,))
    use_gmm: bool = setting(
        False, "Dropless training, which uses grouped products, is `capacity_factor: 0`.", choices=(False,)
    )
    # MindFormers checks their values, although this model does not follow them
    comp_comm_parallel_degree: int = setting(2, "Not read.", least=1)
    update_step: int = setting(10000, "Not read.", least=1)
    cur_layer: int = setting(0, "Not read.", least=0)
    hot_expert_num: int = setting(0, "Not read.", least=0)
    cold_token_percent: float = setting(1.0, "Not read.", above=0, most=1)
    max_router_load: int = setting(128 * 1024, "Not read.")
    topk_bias_update_rate: float = setting(0.0, "Not read.")
    dispatch_global_max_bs: int = setting(0, "Not read.")
    moe_module_name: str = setting("", "Not read.")
    routing_policy: str = setting("TopkRouterV1", "Not read: the router is that of the published model.")
    use_fused_ops_topkrouter: bool = setting(False, "Not read: plain operators find the places of tokens.")
    callback_moe_droprate: bool = setting(False, "Not read.")
    shared_expert_num: int = only(0)
    use_shared_expert_gating: bool = only(False)
    norm_topk_prob: bool = only(True)
    routed_scaling_factor: float = only(1.0)
    topk_method: str = only("greedy")
    n_group: int | None = only(None)
    topk_group: int | None = only(None)
    use_gating_sigmoid: bool = only(False)
    z_loss_factor: float = only(0.0)
    balance_via_topk_bias: bool = only(False)
    enable_cold_hot_expert: bool = only(False)
    save_token_distribution: bool = only(False)
    expert_group_size: int | None = only(None)
    expert_model_parallel: int | None = only(None)
    group_wise_a2a: bool = only(False)
    comp_comm_parallel: bool = only(False)
    moe_shared_expert_overlap: bool = only(False)
    use_allgather_dispatcher: bool = only(False)
    enable_deredundency: bool = only(False)
    npu_nums_per_device: int = only(1)
    enable_gmm_safe_tokens: bool = only(False)
    use_fused_ops_permute: bool = only(False)


@dataclass(frozen=True)
class MoESettings:
    """A mixture of experts.

    Args:
        num_experts: experts of each layer, E; ``expert_num`` of the section.
        top_k: experts that each token is sent to, k; ``num_experts_chosen``.
        capacity_factor: in training an expert takes at most ``ceil(k·T·capacity_factor / E)`` of T tokens
            and drops the rest; 0 drops none. Evaluation and prediction drop none in any case.
        token_major: who is dropped, ``enable_sdrop``: True counts all choices of a token before those of the
            next one, False (k-major) the first choices of all tokens before the second ones.
        balance_factor: α of the auxiliary loss ``α·E·Σ f·P``; ``aux_loss_factors`` of the type "expert".
        ep_extend_tp: the tensor-parallel ranks are expert-parallel ranks inside the block.
    """

    num_experts: int
    top_k: int
    capacity_factor: float
    token_major: bool
    balance_factor: float
    ep_extend_tp: bool

    @classmethod
    def read(cls, section: ExpertSection, intermediate_size: int) -> "MoESettings | None":
        """From the section; None of one expert: a dense model.

        Raises:
            UsageError: MindFormers refuses a value, or it asks for what the model does not have.
        """
        _check_values(section)
        if section.expert_num == 1:
            return None
        _refuse_others(section, intermediate_size)
        return cls(
            num_experts=section.expert_num,
            top_k=section.num_experts_chosen,
            capacity_factor=max(float(section.capacity_factor), 0.0),
            token_major=section.enable_sdrop,
            balance_factor=_balance_factor(section),
            ep_extend_tp=section.ep_extend_tp,
        )

    def capacity(self, tokens: int) -> int:
        """Most rows that an expert takes of ``tokens`` tokens in training; it is never sent more than all."""
        factor = Fraction(str(self.capacity_factor))  # in floating point 4 * 200 * 1.1 / 16 is more than 55
        return min(tokens, math.ceil(self.top_k * tokens * factor / self.num_experts))


def _check_values(section: ExpertSection) -> None:
    """Raise UsageError for values that are of no use to any model, and for choices that this one lacks."""
    is_dense = section.expert_num == 1
    settings = [each for each in settings_of(ExpertSection).values() if not (is_dense and each.choices)]
    check_all(*[(each.check, getattr(section, each.name), "moe_config") for each in settings])
    check_number("moe_config.capacity_factor", section.capacity_factor)
    for key in ("num_experts_chosen", "hot_expert_num"):
        if getattr(section, key) > section.expert_num:
            raise UsageError(
                f"moe_config.{key} is {getattr(section, key)}, but there are {section.expert_num} experts "
                "(expert_num); choose no more."
            )


def _refuse_others(section: ExpertSection, intermediate_size: int) -> None:
    """Raise UsageError for what TeleChat2's mixture of experts is not."""
    if section.moe_intermediate_size not in (ExpertSection.moe_intermediate_size, intermediate_size):
        raise UsageError(
            f"moe_config.moe_intermediate_size is {section.moe_intermediate_size}, but the width of an "
            f"expert is intermediate_size, {intermediate_size}; leave the first one out."
        )
    if str(section.router_dense_type).lower() not in ("float32", "none"):
        raise UsageError(
            f"moe_config.router_dense_type is {section.router_dense_type}; the router is computed in "
            "float32. Set it so, or leave the key out."
        )


def _balance_factor(section: ExpertSection) -> float:
    types, factors = section.aux_loss_types or [], section.aux_loss_factors or []
    listed = isinstance(types, list) and isinstance(factors, list) and len(types) == len(factors)
    if not listed or types not in ([], ["expert"]):
        raise UsageError(
            f"moe_config.aux_loss_types is {types} and aux_loss_factors {factors}; TeleChat2 has the one "
            "auxiliary loss 'expert', with one factor: ['expert'] and [0.01] for the published model."
        )
    factor = factors[0] if factors else 0.0
    check_number("moe_config.aux_loss_factors", factor, least=0)  # below 0 it would reward uneven loads
    return float(factor)
