"""Configs that Ascend's kernels cannot run are refused when the model is built, with what to do."""

import pytest
from refusal import refused

from research.telechat2.model.kernels import ascend, reference, select
from research.telechat2.telechat_config import TelechatConfig

SMALL = {
    "seq_length": 256, "hidden_size": 256, "num_layers": 1, "num_heads": 4, "vocab_size": 64,
    "intermediate_size": 64, "compute_dtype": "float16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_ascend(monkeypatch):
    monkeypatch.setattr(select, "is_cpu", lambda: False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_dynamic": False}, ("is_dynamic", "False", "model_config.is_dynamic", "True")),
        ({"use_flash_attention": False}, ("use_flash_attention", "False", "use_past")),
        ({"compute_dtype": "float32"}, ("compute_dtype", "float32", "float16", "bfloat16")),
        ({"compute_dtype": "bfloat16"}, ("rotary_dtype", "float32", "bfloat16")),
        ({"block_size": 8}, ("block_size", 8, 16)),
        ({"num_heads": 2, "hidden_size": 640}, ("head_dim 320", 256)),
    ],
)
def test_prediction_refuses_what_the_kernels_do_not_take(change, message):
    with refused(*message):
        select.choose_kernels(TelechatConfig(**{**SMALL, "use_past": True, **change}))


@pytest.mark.parametrize(
    "dtypes",
    [("float16", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16")],
)
def test_prediction_takes_every_pair_of_dtypes_the_kernels_have(dtypes):
    compute, rotary = dtypes
    config = TelechatConfig(**{**SMALL, "use_past": True, "compute_dtype": compute, "rotary_dtype": rotary})
    assert isinstance(select.choose_kernels(config).paged_inputs(config), ascend.PagedInputsFused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute_dtype": "float32"}, ("compute_dtype", "float32", "float16", "bfloat16")),
        ({"hidden_size": 160}, ("head_dim", 40, 16)),
        (
            {"document_start_ids": [1], "batch_size": 9},
            ("batch_size 9", "max_documents 128", 1152, 1024),
        ),
    ],
)
def test_training_refuses_what_flash_attention_does_not_take(change, message):
    config = {**SMALL, **change}
    with refused(*message):
        select.choose_kernels(TelechatConfig(**config))
    config = TelechatConfig(**config, use_flash_attention=False)
    plain = select.choose_kernels(config).causal_attention(config)
    assert isinstance(plain.kernel, reference.GroupedAttention)
