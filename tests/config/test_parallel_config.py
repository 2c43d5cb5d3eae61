"""What a plan may ask for is checked when the config is made, in sentences with the values."""

import pytest
from refusal import refused

from research.telechat2.telechat_config import TelechatConfig

SIZES = {
    "batch_size": 1, "seq_length": 64, "hidden_size": 96, "num_layers": 4, "num_heads": 12, "n_kv_heads": 4,
    "intermediate_size": 120, "vocab_size": 100,
}  # fmt: skip
PIPELINE = {"pipeline_stage": 2, "micro_batch_num": 2}
CONTEXT = {"context_parallel": 4, "model_parallel": 2}
INFER = {"model_parallel": 2, "vocab_emb_dp": False}
EXPERTS = {"expert_num": 6, "num_experts_chosen": 2, "capacity_factor": 1.5}


@pytest.mark.parametrize(
    ("plan", "fields", "message"),
    [
        ({"model_parallel": 8}, {}, ("num_heads 12", "model_parallel 8")),
        ({"model_parallel": 6}, {}, ("n_kv_heads 4", "model_parallel 6")),
        (
            {"model_parallel": 4},
            {"intermediate_size": 122},
            ("intermediate_size 122", "model_parallel 4"),
        ),
        (
            {"model_parallel": 4, "vocab_emb_dp": False},
            {"vocab_size": 102},
            ("vocab_size 102", "model_parallel 4", "vocab_emb_dp", "True"),
        ),
        (
            {"model_parallel": 4, "use_seq_parallel": True},
            {"seq_length": 62},
            ("batch_size 1", "seq_length 62", "model_parallel 4"),
        ),
        (CONTEXT | {"context_parallel_algo": "ulysses_cp"}, {}, ("num_heads 12", 8)),
        (
            CONTEXT | {"context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 2},
            {"n_kv_heads": 2},
            ("n_kv_heads 2", 4),
        ),
        (
            CONTEXT | {"context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 3},
            {},
            ("context_parallel 4", "ulysses_degree_in_cp 3"),  # MindFormers says so
        ),
        (CONTEXT, {"seq_length": 62}, ("seq_length 62", "context_parallel 4")),
        (
            CONTEXT | {"use_seq_parallel": True},
            {"seq_length": 68},
            ("seq_length 68", "model_parallel 2", "context_parallel 4"),
        ),
        (CONTEXT, {"batch_size": 2}, ("batch_size", 2, "context_parallel 4", 1)),
        (CONTEXT, {"use_past": True}, ("use_past", "True", "context_parallel 4")),
        (CONTEXT, {"moe_config": EXPERTS}, ("context_parallel 4",)),
        (
            CONTEXT | {"ulysses_degree_in_cp": 2},
            {},
            ("ulysses_degree_in_cp", 2, "colossalai_cp"),
        ),
        ({"seq_split_num": 2}, {}, ("seq_split_num", 2, 1)),
        ({"expert_parallel": 2}, {}, ("expert_parallel", 2)),
        ({"optimizer_shard": True}, {}, ("optimizer_shard", "enable_parallel_optimizer")),
        ({"swap": {"swap": True}}, {}, ("swap_config.swap", "True")),
        (
            {"model_parallel": 2},
            {"use_past": True},
            ("use_past", "True", "vocab_emb_dp True", "vocab_emb_dp", "False"),
        ),
        (
            INFER | {"use_seq_parallel": True},
            {"use_past": True},
            ("use_past", "True", "use_seq_parallel", "False"),
        ),
        (INFER | {"model_parallel": 5}, {"use_past": True}, ("num_heads 12", 5)),
        (INFER, {"use_past": True, "n_kv_heads": 3}, ("n_kv_heads 3", 2)),
        (INFER, {"use_past": True, "vocab_size": 101}, ("vocab_size 101", 2)),
        (
            INFER,
            {"use_past": True, "moe_config": EXPERTS, "intermediate_size": 121},
            ("intermediate_size 121", 2),
        ),
        (
            {"data_parallel": 2, "expert_parallel": 2},
            {"use_past": True, "moe_config": EXPERTS},
            ("use_past", "True", "expert_parallel 2", "expert_parallel", 1),
        ),
        (PIPELINE, {"use_past": True}, ("use_past", "True", "pipeline_stage 2")),
        (PIPELINE, {"tie_word_embeddings": True}, ("tie_word_embeddings", "True")),
        ({"pipeline_stage": 2}, {}, ("micro_batch_num", 1, "pipeline_stage 2")),
        ({}, {"pp_interleave_num": 2}, ("pp_interleave_num", 2, "pipeline_stage", 1)),
        ({}, {"pp_interleave_num": 0}, ("pp_interleave_num", 0)),
        (PIPELINE, {"pp_interleave_num": 2, "disable_lazy_inline": True}, ("disable_lazy_inline", "True")),
        (PIPELINE, {"num_layers": 5}, ("offset", 0, 5, 2)),
        ({}, {"offset": [0, 0]}, ("offset", 1)),
        (
            {"data_parallel": 3, "expert_parallel": 2},
            {"moe_config": EXPERTS},
            ("data_parallel 3", "expert_parallel 2"),
        ),
        (
            {"data_parallel": 4, "expert_parallel": 4},
            {"moe_config": EXPERTS},
            ("expert_num 6", 4),
        ),
        (
            {"model_parallel": 2},
            {"moe_config": EXPERTS | {"ep_extend_tp": True}},
            ("ep_extend_tp", "True", "model_parallel 2", "use_seq_parallel False"),
        ),
        (
            {"model_parallel": 2, "data_parallel": 2, "expert_parallel": 2, "use_seq_parallel": True},
            {"moe_config": EXPERTS | {"ep_extend_tp": True}},
            ("expert_num 6", 4),
        ),
        (
            {"model_parallel": 4},
            {"moe_config": EXPERTS | {"ep_extend_tp": False}, "intermediate_size": 122},
            ("intermediate_size 122", "model_parallel 4"),
        ),
        (
            {"model_parallel": 2, "use_seq_parallel": True},
            {"moe_config": EXPERTS | {"ep_extend_tp": False, "capacity_factor": 0}},
            ("capacity_factor", 0, "model_parallel 2"),
        ),
    ],
)
def test_plans_that_cannot_be_are_refused(plan, fields, message):
    with refused(*message):
        TelechatConfig(**SIZES | fields, parallel_config=plan)


@pytest.mark.parametrize(
    ("plan", "fields"),
    [
        ({"model_parallel": 4, "use_seq_parallel": True, "vocab_emb_dp": False}, {}),
        ({"model_parallel": 4, "vocab_emb_dp": True}, {"vocab_size": 102}),
        ({"model_parallel": 4}, {"seq_length": 62}),
        ({"model_parallel": 4, "use_seq_parallel": True}, {"seq_length": 62, "batch_size": 2}),
        ({"data_parallel": 3}, {"use_past": True}),
        (INFER, {"use_past": True, "moe_config": EXPERTS}),  # none of training's rules for experts
        (CONTEXT | {"use_seq_parallel": True}, {}),
        ({"context_parallel": 4, "context_parallel_algo": "ulysses_cp"}, {}),
        (PIPELINE, {"num_layers": 5, "offset": [0, 1]}),
        ({"data_parallel": 2, "expert_parallel": 2}, {"moe_config": EXPERTS}),
    ],
)
def test_plans_that_can_be_are_taken(plan, fields):
    section = TelechatConfig(**SIZES | fields, parallel_config=plan).parallel_config
    for key, value in plan.items():
        taken = getattr(section, key)
        assert getattr(taken, "value", taken) == value
