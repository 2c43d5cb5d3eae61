"""What the parallel model refuses, before it computes anything."""

import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters
from model_fixtures import PAD, RandomModel
from refusal import refused

from research.telechat2.infer.telechat import ParallelTelechatForCausalLM
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

SIZES = {
    "hidden_size": 64, "num_layers": 1, "num_heads": 4, "intermediate_size": 96, "vocab_size": 128,
    "seq_length": 32, "block_size": 4, "num_blocks": 5, "use_past": True, "compute_dtype": "float32",
    "param_init_type": "float32",
}  # fmt: skip


def build(kind=ParallelTelechatForCausalLM, **more):
    with no_init_parameters():
        return kind(TelechatConfig(**SIZES | more)).set_train(False)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return RandomModel(
        tmp_path_factory.mktemp("random"), hidden_size=64, n_head=4, n_layer=1, ffn_hidden_size=96,
        vocab_size=128,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        (
            ParallelTelechatForCausalLM,
            {"use_past": False},
            ("use_past", "model_config.use_past: True"),
        ),
        (
            ParallelTelechatForCausalLM,
            {"parallel_config": {"model_parallel": 2, "vocab_emb_dp": False}},
            ("model_parallel is 2", 1, "scripts/msrun_launcher.sh"),
        ),
        (
            TelechatForCausalLM,
            {"parallel_config": {"model_parallel": 2, "vocab_emb_dp": False}},
            ("model_parallel 2", "model.arch.type: ParallelTelechatForCausalLM"),
        ),
        (TelechatForCausalLM, {"qkv_concat": True}, ("qkv_concat", "ParallelTelechatForCausalLM")),
        (TelechatForCausalLM, {"qkv_concat": True, "use_past": False}, ("qkv_concat", "use_past")),
    ],
)
def test_models_that_cannot_be_are_refused(kind, change, named):
    with refused(*named):
        build(kind, **change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 2}, ["layers"]),
        ({"intermediate_size": 92}, (96, 92)),
        ({"vocab_size": 132}, (128, 132)),
        ({"moe_config": {"expert_num": 3, "num_experts_chosen": 2}}, ["expert"]),
    ],
)
def test_weights_that_do_not_fit_are_an_error(random, change, named):
    """Whole models and joined rows: never random weights."""
    for joined in (False, True):
        model = build(qkv_concat=joined, **change)
        with refused(*named):
            model.load_weights(random.hf)


def test_a_batch_that_may_outgrow_the_pool_is_refused_before_its_first_step(random):
    """Five blocks of four: the last token of an answer is not cached, so 21 tokens fit, and 22 do not."""
    model = build(num_blocks=5)
    model.load_weights(random.hf)
    rows = np.array([[7] * 9, [5, 6] + [PAD] * 7])
    settings = {"do_sample": False, "eos_token_id": [-1], "pad_token_id": PAD}
    for limits in ({"max_new_tokens": 6}, {"max_length": 11}):  # 14 and 7 cached tokens, 10 and 10
        with refused("6 blocks", 5, "model_config.num_blocks"):
            model.generate(rows, **limits, **settings)
    assert not model.compile_cache  # nothing was run
    answer = model.generate(rows[:1], max_new_tokens=12, **settings)[0]
    assert len(answer) == 21
    with refused("6 blocks"):
        model.generate(rows[:1], max_new_tokens=13, **settings)
    again = model.generate(rows[:1], max_new_tokens=12, **settings)[0]  # all blocks are free again
    np.testing.assert_array_equal(again, answer)
