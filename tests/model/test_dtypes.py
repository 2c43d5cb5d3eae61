"""Every dtype field does what it says on a CPU: float16 works and is near float32, bfloat16 is refused."""

import numpy as np
import pytest
import torch
from model_fixtures import RandomModel, int32
from refusal import refused

FIELDS = (
    "compute_dtype", "param_init_type", "embedding_init_type", "layernorm_compute_type",
    "softmax_compute_type", "rotary_dtype", "res_dtype",
)  # fmt: skip


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return RandomModel(
        tmp_path_factory.mktemp("dtypes"),
        hidden_size=128,
        n_head=2,
        n_layer=1,
        ffn_hidden_size=192,
        vocab_size=256,
    )


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 256, (2, 20))


@pytest.fixture(scope="module")
def expected(random, ids) -> np.ndarray:
    with torch.no_grad():
        return random.oracle(torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize("fields", [*((name,) for name in FIELDS), FIELDS], ids=lambda names: names[-1])
def test_float16_is_near_float32_but_not_the_same(random, ids, expected, fields):
    model = random.build(seq_length=32, **dict.fromkeys(fields, "float16"))
    logits = model(int32(ids))[0].asnumpy()
    assert 1e-5 < np.abs(logits - expected).max() < 0.03  # a field that is ignored would be nearer


def test_float16_prediction_stays_finite(random, ids, expected):
    settings = dict.fromkeys(FIELDS, "float16") | {"use_past": True, "block_size": 4, "num_blocks": 16}
    model = random.build(seq_length=32, **settings)
    answers = model.generate(
        ids[:, :6].tolist(), max_new_tokens=3, do_sample=False, eos_token_id=[-1],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    np.testing.assert_allclose(answers["logits"][0], expected[:, 5], rtol=0, atol=0.03)
    assert all(np.isfinite(logits).all() for logits in answers["logits"])


@pytest.mark.parametrize("use_past", [True, False])
@pytest.mark.parametrize("field", FIELDS[:-1])
def test_bfloat16_is_refused_where_a_cpu_has_no_kernels(random, field, use_past):
    with refused(field, "bfloat16", "model_config.", "float32"):
        random.build(seq_length=32, use_past=use_past, **{field: "bfloat16"})
