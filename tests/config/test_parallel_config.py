"""What a plan may ask for is checked when the config is made, in sentences with the values."""

import pytest

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
        ({"model_parallel": 8}, {}, "num_heads 12 is not divisible by .*model_parallel 8"),
        ({"model_parallel": 6}, {}, "n_kv_heads 4 is not divisible by .*model_parallel 6"),
        (
            {"model_parallel": 4},
            {"intermediate_size": 122},
            "intermediate_size 122 is not divisible by .*model_parallel 4",
        ),
        (
            {"model_parallel": 4, "vocab_emb_dp": False},
            {"vocab_size": 102},
            "vocab_size 102 is not divisible by .*model_parallel 4.*or set vocab_emb_dp: True",
        ),
        (
            {"model_parallel": 4, "use_seq_parallel": True},
            {"seq_length": 62},
            "batch_size 1 times seq_length 62 is not divisible by .*model_parallel 4",
        ),
        (CONTEXT | {"context_parallel_algo": "ulysses_cp"}, {}, "num_heads 12 is not divisible by 8"),
        (
            CONTEXT | {"context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 2},
            {"n_kv_heads": 2},
            "n_kv_heads 2 is not divisible by 4",
        ),
        (
            CONTEXT | {"context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 3},
            {},
            "context_parallel 4 should be divisible by ulysses_degree_in_cp 3",  # MindFormers says so
        ),
        (CONTEXT, {"seq_length": 62}, "seq_length 62 is not divisible by .*context_parallel 4"),
        (CONTEXT | {"use_seq_parallel": True}, {"seq_length": 68}, "not divisible by .* 2 times .* 4"),
        (CONTEXT, {"batch_size": 2}, "batch_size is 2 and .*context_parallel 4.*Set batch_size to 1"),
        (CONTEXT, {"use_past": True}, "use_past is True.*context_parallel 4"),
        (CONTEXT, {"moe_config": EXPERTS}, "context_parallel 4, but the model has experts"),
        (
            CONTEXT | {"ulysses_degree_in_cp": 2},
            {},
            "ulysses_degree_in_cp is 2, but .*colossalai_cp does not",
        ),
        ({"seq_split_num": 2}, {}, "seq_split_num is 2.*Set it to 1"),
        ({"expert_parallel": 2}, {}, "expert_parallel is 2, but the model has no experts"),
        ({"optimizer_shard": True}, {}, "optimizer_shard has no effect.*enable_parallel_optimizer"),
        ({"swap": {"swap": True}}, {}, "swap_config.swap is True"),
        (
            {"model_parallel": 2},
            {"use_past": True},
            "use_past is True.*vocab_emb_dp True.*set vocab_emb_dp: False",
        ),
        (INFER | {"use_seq_parallel": True}, {"use_past": True}, "use_past is True.*use_seq_parallel: False"),
        (INFER | {"model_parallel": 5}, {"use_past": True}, "num_heads 12 is not divisible by .*5"),
        (INFER, {"use_past": True, "n_kv_heads": 3}, "n_kv_heads 3 is not divisible by .*2"),
        (INFER, {"use_past": True, "vocab_size": 101}, "vocab_size 101 is not divisible by .*2"),
        (
            INFER,
            {"use_past": True, "moe_config": EXPERTS, "intermediate_size": 121},
            "intermediate_size 121 is not divisible by .*2",
        ),
        (
            {"data_parallel": 2, "expert_parallel": 2},
            {"use_past": True, "moe_config": EXPERTS},
            "use_past is True and .*expert_parallel 2.*Set expert_parallel to 1",
        ),
        (PIPELINE, {"use_past": True}, "use_past is True.*pipeline_stage 2"),
        (PIPELINE, {"tie_word_embeddings": True}, "tie_word_embeddings is True.*cannot be one tensor"),
        ({"pipeline_stage": 2}, {}, "micro_batch_num is 1, less than pipeline_stage 2"),
        ({}, {"pp_interleave_num": 2}, "pp_interleave_num is 2, but .*pipeline_stage is 1"),
        ({}, {"pp_interleave_num": 0}, "pp_interleave_num is 0"),
        (PIPELINE, {"pp_interleave_num": 2, "disable_lazy_inline": True}, "disable_lazy_inline is True"),
        (PIPELINE, {"num_layers": 5}, "offset is 0, which adds 0 layers, but 5 layers on 2 stages"),
        ({}, {"offset": [0, 0]}, "offset is .*a list of 1"),
        (
            {"data_parallel": 3, "expert_parallel": 2},
            {"moe_config": EXPERTS},
            "data_parallel 3 is not divisible by expert_parallel 2",
        ),
        (
            {"data_parallel": 4, "expert_parallel": 4},
            {"moe_config": EXPERTS},
            "expert_num 6 is not divisible by the 4 devices",
        ),
        (
            {"model_parallel": 2},
            {"moe_config": EXPERTS | {"ep_extend_tp": True}},
            "ep_extend_tp is True, model_parallel 2 and use_seq_parallel False",
        ),
        (
            {"model_parallel": 2, "data_parallel": 2, "expert_parallel": 2, "use_seq_parallel": True},
            {"moe_config": EXPERTS | {"ep_extend_tp": True}},
            "expert_num 6 is not divisible by the 4 devices",
        ),
        (
            {"model_parallel": 4},
            {"moe_config": EXPERTS | {"ep_extend_tp": False}, "intermediate_size": 122},
            "intermediate_size 122 is not divisible by .*model_parallel 4",
        ),
        (
            {"model_parallel": 2, "use_seq_parallel": True},
            {"moe_config": EXPERTS | {"ep_extend_tp": False, "capacity_factor": 0}},
            "capacity_factor is 0.* and model_parallel 2 splits",
        ),
    ],
)
def test_plans_that_cannot_be_are_refused(plan, fields, message):
    with pytest.raises(ValueError, match=message):
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
