"""MoESettings: what TeleChat2 takes from MindFormers' ``moe_config`` section, and what it refuses.

Needs neither MindSpore nor MindFormers, so that a plan is checked at once: see plain_section.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace

from research.telechat2.common.errors import UsageError

# MindFormers' defaults of keys that are looked at; a test compares them.
DEFAULTS = {
    "expert_num": 1, "num_experts_chosen": 1, "capacity_factor": 1.1, "enable_sdrop": False,
    "aux_loss_types": None, "aux_loss_factors": None, "ep_extend_tp": True, "router_dense_type": "float32",
    "first_k_dense_replace": True, "moe_intermediate_size": 1407, "aux_loss_factor": 0.05, "use_gmm": False,
}  # fmt: skip
# Keys of which MindFormers checks the values, although this model does not follow them.
_COUNTS = {"comp_comm_parallel_degree": 1, "update_step": 1, "cur_layer": 0, "hot_expert_num": 0}
# Keys whose other values ask for what this model does not have. Keys not listed are read below, or have no
# bearing on it: use_fused_ops_topkrouter, since plain operators find the places of tokens on every target.
_FIXED = {
    "shared_expert_num": 0,
    "use_shared_expert_gating": False,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "n_group": None,
    "topk_group": None,
    "use_gating_sigmoid": False,
    "z_loss_factor": 0.0,
    "balance_via_topk_bias": False,
    "enable_cold_hot_expert": False,
    "save_token_distribution": False,
    "expert_group_size": None,
    "expert_model_parallel": None,
    "group_wise_a2a": False,
    "comp_comm_parallel": False,
    "moe_shared_expert_overlap": False,
    "use_allgather_dispatcher": False,
    "enable_deredundency": False,
    "npu_nums_per_device": 1,
    "enable_gmm_safe_tokens": False,
    "use_fused_ops_permute": False,
}
# Keys that have a meaning here, but under another name.
_ADVICE = {
    "use_gmm": "dropless training, which uses grouped matrix products, is capacity_factor: 0",
    "aux_loss_factor": "the factor of the auxiliary loss stands in aux_loss_factors",
}


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
    def read(cls, section, intermediate_size: int) -> "MoESettings | None":
        """From MindFormers' object of the section, or a plain_section; None of one expert: a dense model.

        Raises:
            UsageError: for a value that asks for what the model does not have.
        """
        if section.expert_num == 1:
            return None
        _refuse_others(section, intermediate_size)
        return cls(
            num_experts=section.expert_num,
            top_k=section.num_experts_chosen,
            capacity_factor=max(_number("capacity_factor", section.capacity_factor), 0.0),
            token_major=section.enable_sdrop,
            balance_factor=_balance_factor(section),
            ep_extend_tp=getattr(section, "ep_extend_tp", True),  # MindFormers' own object forgets it
        )

    def capacity(self, tokens: int) -> int:
        """Most rows that an expert takes of ``tokens`` tokens in training; it is never sent more than all."""
        factor = Fraction(str(self.capacity_factor))  # in floating point 4 * 200 * 1.1 / 16 is more than 55
        return min(tokens, math.ceil(self.top_k * tokens * factor / self.num_experts))


def plain_section(section: dict) -> SimpleNamespace:
    """The section as a YAML has it, with MindFormers' defaults and checked by its rules.

    Raises:
        UsageError: MindFormers would refuse it.
    """
    values = DEFAULTS | section
    for key, least in {"expert_num": 1, "num_experts_chosen": 1, **_COUNTS}.items():
        value = values.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"moe_config.{key} is {value!r}; it must be a whole number of at least {least}.")
    for key in ("num_experts_chosen", "hot_expert_num"):
        if values.get(key, 0) > values["expert_num"]:
            raise UsageError(
                f"moe_config.{key} is {values[key]}, but there are {values['expert_num']} experts "
                "(expert_num); choose no more."
            )
    if not isinstance(values["ep_extend_tp"], bool):
        raise UsageError(f"moe_config.ep_extend_tp is {values['ep_extend_tp']!r}; it must be True or False.")
    if not 0 < _number("cold_token_percent", values.get("cold_token_percent", 1.0)) <= 1:
        raise UsageError(
            f"moe_config.cold_token_percent is {values['cold_token_percent']}; it must be above 0 and at "
            "most 1. Leave the key out."
        )
    return SimpleNamespace(**values)


def _refuse_others(section, intermediate_size: int) -> None:
    """Raise UsageError for what TeleChat2's mixture of experts is not."""
    for key, fixed in _FIXED.items():
        if getattr(section, key, fixed) != fixed:
            raise UsageError(
                f"moe_config.{key} is {getattr(section, key)!r}; TeleChat2's mixture of experts has "
                f"{key}: {fixed} only. Set it so, or leave the key out."
            )
    for key, advice in _ADVICE.items():
        if getattr(section, key, DEFAULTS[key]) != DEFAULTS[key]:
            raise UsageError(f"moe_config.{key} is {getattr(section, key)}; {advice}. Leave the key out.")
    if not isinstance(section.enable_sdrop, bool):
        raise UsageError(f"moe_config.enable_sdrop is {section.enable_sdrop!r}; it must be True or False.")
    if section.first_k_dense_replace not in (True, False):
        raise UsageError(
            f"moe_config.first_k_dense_replace is {section.first_k_dense_replace}, but every layer of "
            "TeleChat2 is a mixture of experts; leave the key out."
        )
    if section.moe_intermediate_size not in (DEFAULTS["moe_intermediate_size"], intermediate_size):
        raise UsageError(
            f"moe_config.moe_intermediate_size is {section.moe_intermediate_size}, but the width of an "
            f"expert is intermediate_size, {intermediate_size}; leave the first one out."
        )
    if str(section.router_dense_type).lower() not in ("float32", "none"):
        raise UsageError(
            f"moe_config.router_dense_type is {section.router_dense_type}; the router is computed in "
            "float32. Set it so, or leave the key out."
        )


def _balance_factor(section) -> float:
    types, factors = section.aux_loss_types or [], section.aux_loss_factors or []
    listed = isinstance(types, list) and isinstance(factors, list) and len(types) == len(factors)
    if not listed or types not in ([], ["expert"]):
        raise UsageError(
            f"moe_config.aux_loss_types is {types} and aux_loss_factors {factors}; TeleChat2 has the one "
            "auxiliary loss 'expert', with one factor: ['expert'] and [0.01] for the published model."
        )
    factor = _number("aux_loss_factors", factors[0]) if factors else 0.0
    if factor < 0:
        raise UsageError(
            f"moe_config.aux_loss_factors is {factors}, which would reward uneven loads; use at least 0."
        )
    return factor


def _number(key: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"moe_config.{key} is {value!r}; it must be a finite number.")
    return float(value)
