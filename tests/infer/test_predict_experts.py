"""Prediction with a mixture of experts: its section reaches the model, and its answers are the oracle's."""

import pytest
from model_fixtures import RandomModel
from predict_model import NEW_TOKENS, QUESTIONS, SIZES, asked, oracle_answer, write_yaml
from refusal import refused

from research.telechat2.checkpoint.convert import read_mindspore_tensors
from research.telechat2.infer.loading import load_predictor

EXPERTS = {"expert_num": 4, "num_experts_chosen": 2}


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> RandomModel:
    folder = tmp_path_factory.mktemp("experts")
    return RandomModel(folder, seed=8, **SIZES, num_experts=4, num_experts_per_tok=2)


def test_answers_equal_the_oracles_whatever_capacity_training_had(experts, small_vocab, tmp_path):
    file = write_yaml(tmp_path / "p.yaml", moe_config=EXPERTS | {"capacity_factor": 0.01})
    predictor = load_predictor(
        file, small_vocab, experts.weights, batch_size=3, generation={"max_new_tokens": NEW_TOKENS}
    )
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS]
    expected = [oracle_answer(experts, prompt, NEW_TOKENS) for prompt in prompts]
    assert [answer.ids for answer in predictor.generate(prompts)] == expected


def test_a_checkpoint_with_the_statistics_of_training_loads(experts, small_vocab, tmp_path):
    """They are no weights: neither missing nor foreign."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    load = {f"model.layers.{i}.feed_forward.expert_load": np.ones((2, 4), np.float32) for i in range(2)}
    save_file(load_file(experts.weights) | load, tmp_path / "trained.safetensors")
    file = write_yaml(tmp_path / "p.yaml", moe_config=EXPERTS)
    model = load_predictor(file, small_vocab, tmp_path / "trained.safetensors").model
    found = {name: parameter for name, parameter in model.parameters_and_names()}
    for name, array in read_mindspore_tensors(experts.weights):
        np.testing.assert_array_equal(found[name].asnumpy(), array, err_msg=name)


def test_dense_weights_and_experts_are_never_mixed_up(experts, random, small_vocab, config_file, tmp_path):
    with refused("ffn.w1.weight"):
        load_predictor(config_file, small_vocab, experts.weights)
    file = write_yaml(tmp_path / "p.yaml", moe_config=EXPERTS)
    with refused("feed_forward.w1.weight"):
        load_predictor(file, small_vocab, random.weights)
    file = write_yaml(tmp_path / "p.yaml", moe_config=EXPERTS | {"expert_num": 8})
    with refused("router.dense.weight", [4, 64], [8, 64]):
        load_predictor(file, small_vocab, experts.weights)


def test_a_mistyped_or_misplaced_section_is_named(experts, small_vocab, tmp_path):
    file = write_yaml(tmp_path / "p.yaml", moe_config={"expert_nums": 4})
    with refused("moe_config.expert_nums", "expert_num"):
        load_predictor(file, small_vocab, experts.weights)
    file = write_yaml(tmp_path / "p.yaml", {"moe_config": EXPERTS})
    with refused("moe_config", "model.model_config"):
        load_predictor(file, small_vocab, experts.weights)
