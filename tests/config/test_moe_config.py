"""MoESettings: read from every form in which MindFormers hands over its section; the released sizes."""

import inspect
import math

import mindspore as ms
import pytest
from mindformers import MindFormerConfig
from mindformers.core.parallel_config import build_parallel_config
from mindformers.modules.transformer import moe as mindformers_moe
from mindspore.nn.utils import no_init_parameters
from refusal import refused

from research.telechat2.compat.library import moe_config_from
from research.telechat2.config.fields import defaults_of
from research.telechat2.config.moe import ExpertSection, MoESettings
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

# The section of the released fine-tuning YAML (spec 11.1).
RELEASED = {
    "expert_num": 16,
    "capacity_factor": 1.2,
    "aux_loss_factors": [0.01],
    "aux_loss_types": ["expert"],
    "num_experts_chosen": 4,
    "routing_policy": "TopkRouterV2",
    "enable_sdrop": False,
    "use_fused_ops_topkrouter": True,
    "router_dense_type": "float32",
    "group_wise_a2a": False,
    "shared_expert_num": 0,
    "comp_comm_parallel": False,
    "comp_comm_parallel_degree": 2,
    "balance_via_topk_bias": False,
    "topk_bias_update_rate": 0.0,
    "ep_extend_tp": True,
}
# The section of the released prediction YAML (spec 11.3).
PREDICT = {
    "expert_num": 16,
    "capacity_factor": 1.8,
    "num_experts_chosen": 4,
    "moe_intermediate_size": 6144,
    "routing_policy": "TopkRouterV2",
    "enable_sdrop": False,
    "use_fused_ops_topkrouter": True,
    "shared_expert_num": 0,
    "balance_via_topk_bias": False,
    "topk_bias_update_rate": 2.5e-05,
    "norm_topk_prob": True,
    "max_router_load": 131072,
}
SIZES = {"hidden_size": 4096, "num_heads": 32, "intermediate_size": 6144, "vocab_size": 131072}


def settings_of(section) -> MoESettings | None:
    return TelechatConfig(**SIZES, moe_config=section).moe


def from_trainer(section: dict):
    """What a run, and MindFormers' Trainer after it, makes of a YAML's section."""
    config = MindFormerConfig(
        moe_config=moe_config_from(section), use_legacy=True, parallel_config={}, recompute_config={}
    )
    build_parallel_config(config)
    return config.moe_config


# --- read ---------------------------------------------------------------------------------------------------

FORMS = {
    "section": dict,
    "mindformers-section": lambda section: MindFormerConfig(**section),
    "trainer": from_trainer,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_released_section_is_read(form):
    expected = MoESettings(
        num_experts=16, top_k=4, capacity_factor=1.2, token_major=False, balance_factor=0.01,
        ep_extend_tp=True,
    )  # fmt: skip
    assert settings_of(FORMS[form](RELEASED)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_every_setting_can_be_another(form):
    section = RELEASED | {
        "expert_num": 8, "num_experts_chosen": 2, "capacity_factor": 0, "enable_sdrop": True,
        "aux_loss_factors": [0.5], "use_fused_ops_topkrouter": False, "ep_extend_tp": False,
    }  # fmt: skip
    expected = MoESettings(
        num_experts=8, top_k=2, capacity_factor=0.0, token_major=True, balance_factor=0.5,
        ep_extend_tp=False,
    )  # fmt: skip
    assert settings_of(FORMS[form](section)) == expected


def test_mindformers_own_object_forgets_ep_extend_tp():
    """It is made where no command of the plugin runs; then its default holds."""
    own = mindformers_moe.MoEConfig(**RELEASED)
    assert not hasattr(own, "ep_extend_tp")
    assert settings_of(own) == settings_of(RELEASED)


def test_the_released_prediction_section_is_read():
    settings = settings_of(PREDICT)
    assert (settings.num_experts, settings.top_k, settings.balance_factor) == (16, 4, 0.0)


@pytest.mark.parametrize("section", [None, {}, {"expert_num": 1}, {"expert_num": 1, "capacity_factor": 1.5}])
def test_one_expert_is_a_dense_model(section):
    assert settings_of(section) is None


def test_a_negative_capacity_factor_is_none():
    """As in MindFormers, where no fixed capacity is set by any factor up to 0."""
    assert settings_of(RELEASED | {"capacity_factor": -1.0}).capacity_factor == 0.0


def test_settings_come_back_from_the_configs_dictionary():
    config = TelechatConfig(**SIZES, moe_config=RELEASED | {"ep_extend_tp": False})
    assert TelechatConfig(**config.to_dict()).moe == config.moe


def test_a_section_is_read_as_by_mindformers_without_it():
    theirs = inspect.signature(mindformers_moe.MoEConfig.__init__).parameters
    assert {key: each.default for key, each in theirs.items() if key != "self"} == defaults_of(ExpertSection)
    for section in (RELEASED, PREDICT, RELEASED | {"capacity_factor": 0, "aux_loss_factors": [0.5]}):
        assert MoESettings.read(ExpertSection(**section), 6144) == settings_of(section)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_expert_num": 1}, ("moe_config.shared_expert_num", 1, "shared_expert_num", 0)),
        ({"norm_topk_prob": False}, ("moe_config.norm_topk_prob", "False", "norm_topk_prob", "True")),
        ({"routed_scaling_factor": 2.5}, ("moe_config.routed_scaling_factor", "2.5", "1.0")),
        ({"topk_method": "group_limited_greedy"}, ("moe_config.topk_method", "'group_limited_greedy'")),
        ({"use_gating_sigmoid": True}, ("moe_config.use_gating_sigmoid", "True", "False")),
        ({"z_loss_factor": 0.001}, ("moe_config.z_loss_factor", "0.001")),
        ({"balance_via_topk_bias": True}, ("moe_config.balance_via_topk_bias", "True")),
        ({"enable_cold_hot_expert": True}, ("moe_config.enable_cold_hot_expert", "True")),
        ({"group_wise_a2a": True}, ("moe_config.group_wise_a2a", "True")),
        ({"use_gmm": True}, ("moe_config.use_gmm", "True", "capacity_factor", 0)),
        ({"aux_loss_factor": 0.01}, ("aux_loss_factor", "0.01", "aux_loss_factors")),
        ({"first_k_dense_replace": 3}, ("moe_config.first_k_dense_replace", 3)),
        ({"moe_intermediate_size": 512}, ("moe_intermediate_size", 512, "intermediate_size", 6144)),
        ({"router_dense_type": "bfloat16"}, ("moe_config.router_dense_type", "BFloat16", "float32")),
        ({"aux_loss_types": ["expert"] * 2, "aux_loss_factors": [0.1, 0.1]}, ("'expert'",)),
        ({"aux_loss_types": ["comm"]}, ("aux_loss_types", "['comm']", "aux_loss_factors [0.01]")),
        ({"aux_loss_factors": []}, ("aux_loss_types", "['expert']", "aux_loss_factors []")),
        ({"aux_loss_types": None}, ("aux_loss_factors", "[0.01]", "aux_loss_types")),
        ({"aux_loss_factors": ["0.01"]}, ("aux_loss_factors", "'0.01'")),
        ({"aux_loss_factors": [-0.01]}, ("aux_loss_factors", -0.01)),
        ({"capacity_factor": "1.2"}, ("moe_config.capacity_factor", "'1.2'")),
        ({"capacity_factor": math.inf}, ("moe_config.capacity_factor", "inf")),
        ({"capacity_factor": math.nan}, ("moe_config.capacity_factor", "nan")),
        ({"capacity_factor": None}, ("moe_config.capacity_factor", "None")),
        ({"enable_sdrop": "False"}, ("moe_config.enable_sdrop", "'False'", "True", "False")),
        ({"expert_num": 0}, ("moe_config", "MindFormers", "'expert_num'")),
        ({"expert_num": "16"}, ("moe_config", "MindFormers", "'expert_num'")),
        ({"num_experts_chosen": 17}, ("'num_experts_chosen'", "'expert_num'", 17)),
        ({"ep_extend_tp": "yes"}, ("moe_config", "MindFormers", "'ep_extend_tp'")),
        ({"experts": 16}, ("moe_config", "MindFormers", "'experts'")),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("form", ["section", "trainer"])
def test_what_the_model_is_not_is_refused_with_a_sentence(form, change, message):
    with refused(*message) as raised:
        settings_of(FORMS[form](RELEASED | change))
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(
    "change",
    [
        {"expert_num": 0}, {"expert_num": "16"}, {"num_experts_chosen": 17}, {"ep_extend_tp": "yes"},
        {"update_step": 0}, {"cur_layer": -1}, {"hot_expert_num": 17}, {"cold_token_percent": 0},
        {"aux_loss_types": "expert"}, {"aux_loss_types": None}, {"aux_loss_factors": 0.01},
    ],
    ids=str,
)  # fmt: skip
def test_what_mindformers_refuses_is_refused_without_it(change):
    with refused():
        settings_of(RELEASED | change)
    with refused("moe_config.", next(iter(change))):
        MoESettings.read(ExpertSection(**RELEASED | change), 6144)


@pytest.mark.parametrize("section", [16, "16", [{"expert_num": 16}]])
def test_what_is_no_section_is_refused(section):
    with refused("moe_config"):
        settings_of(section)


def test_experts_run_without_dropout():
    with refused("hidden_dropout_prob", "0.1"):
        TelechatConfig(**SIZES, moe_config=RELEASED, hidden_dropout_prob=0.1)


# --- capacity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "factor", "capacity"),
    [
        (8192, 1.2, 2458),  # 2457.6
        (10, 1.2, 3),  # 3 exactly
        (200, 1.1, 55),  # 55 exactly, where floating point has a little more
        (4096, 1.1, 1127),  # 1126.4
        (4096, 1.0, 1024),
        (100, 1, 25),
        (7, 0.001, 1),  # a fraction of a row is a row
        (1, 1.2, 1),
        (6, 8.0, 6),  # 12, but no more than all tokens ask
        (1_000_000, 1e-5, 3),  # 2.5
    ],
)
def test_capacity_is_an_even_share_times_the_factor_rounded_up(tokens, factor, capacity):
    """4 of 16 experts: an even share is a quarter of the tokens."""
    assert settings_of(RELEASED | {"capacity_factor": factor}).capacity(tokens) == capacity


# --- the released model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built():
    """All 30 layers at full width: parameters that have shapes but no memory."""
    with no_init_parameters():
        return TelechatForCausalLM(
            TelechatConfig(
                **SIZES, num_layers=30, seq_length=16, compute_dtype="float32", moe_config=RELEASED
            )
        )


def count(parameters) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def test_the_39b_model_has_its_published_number_of_parameters(built):
    """In total, and active: those of 12 of the 16 experts are not used by a token."""
    parameters = built.trainable_params()
    total, experts = count(parameters), count(p for p in parameters if ".feed_forward.ffn." in p.name)
    assert total == 39_330_099_200
    assert experts * (16 - 4) % 16 == 0
    assert total - experts * (16 - 4) // 16 == 12_149_534_720
    assert 4 * total > 120 * 2**30  # which a test machine does not have: nothing was allocated


@pytest.mark.parametrize("layer", [0, 29])
def test_every_layer_has_the_published_names_and_shapes(built, layer):
    prefix = f"model.layers.{layer}.feed_forward"
    found = {p.name: p.shape for p in built.trainable_params() if p.name.startswith(f"{prefix}.")}
    assert found == {
        f"{prefix}.router.dense.weight": (16, 4096),
        f"{prefix}.ffn.w1.weight": (16, 6144, 4096),
        f"{prefix}.ffn.w3.weight": (16, 6144, 4096),
        f"{prefix}.ffn.w2.weight": (16, 4096, 6144),
        f"{prefix}.ffn.w2.bias": (1, 16, 1, 4096),
    }


def test_only_statistics_are_no_weights(built):
    others = [p.name for p in built.get_parameters() if not p.requires_grad]
    assert others == [f"model.layers.{i}.feed_forward.expert_load" for i in range(30)]


def test_a_fresh_mixture_has_the_published_spread():
    """The router starts with standard deviation 0.01, experts as other linears, biases at 0 (spec 1.2)."""
    ms.set_seed(1)
    model = TelechatForCausalLM(
        TelechatConfig(
            num_layers=1, hidden_size=256, num_heads=2, intermediate_size=128, vocab_size=64,
            compute_dtype="float32", moe_config=RELEASED,
        )
    )  # fmt: skip
    for parameter in model.model.layers[0].feed_forward.trainable_params():
        values = parameter.asnumpy()
        if parameter.name.endswith("bias"):
            assert not values.any()
        else:
            spread = 0.01 if ".router." in parameter.name else 0.0048
            assert abs(values.std() / spread - 1) < 0.05, parameter.name
            assert abs(values.mean()) < 4 * spread / math.sqrt(values.size), parameter.name
