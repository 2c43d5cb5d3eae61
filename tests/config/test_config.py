"""TelechatConfig: every field is checked when it is made, and it survives what MindFormers does with it."""

import json

import mindspore as ms
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindformers.generation.generation_config import GenerationConfig
from mindformers.modules.transformer.transformer import TransformerOpParallelConfig
from refusal import refused

from research.telechat2.config.model import DEAD_KEYS, feed_forward_width
from research.telechat2.telechat_config import TelechatConfig


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("num_layer", "num_layers"),
        ("hidden_sizes", "hidden_size"),
        ("n_kv_head", "n_kv_heads"),
        ("seqlength", "seq_length"),
        ("extend_methods", "extend_method"),
        ("rms_norm_epsilon", "rms_norm_eps"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key, nearest):
    with refused(repr(key), repr(nearest)):
        TelechatConfig(**{key: 8})


def test_a_key_near_none_lists_those_that_exist():
    with refused("'xyzzy'", "hidden_size", "vocab_size"):
        TelechatConfig(xyzzy=1)


@pytest.mark.parametrize("key", DEAD_KEYS)
def test_a_key_without_effect_is_named_and_left_out(key, caplog):
    reason, harmless = DEAD_KEYS[key]
    caplog.set_level("WARNING", "telechat2")
    config = TelechatConfig(**{key: True if harmless is None else harmless[0]})
    assert not hasattr(config, key)
    assert any(key in record.getMessage() and reason in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("out_proj_has_bias", False),
        ("qkv_has_bias", True),
        ("hidden_act", "gelu"),
        ("router_dense_type", "bfloat16"),
    ],
)
def test_what_a_key_without_effect_would_ask_for_is_refused(key, value):
    with refused(key, value):
        TelechatConfig(**{key: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": -1e-5}, ("rms_norm_eps", "-1e-05", 0)),
        ({"rms_norm_eps": 0}, ("rms_norm_eps", 0)),
        ({"theta": 0.0}, ("theta", "0.0")),
        ({"theta": float("inf")}, ("theta", "inf")),
        ({"sigma": -0.1}, ("sigma", "-0.1", 0)),
        ({"extend_method": "LLAMA3"}, ("extend_method", "'LLAMA3'", "None", "NTK")),
        ({"scaling_factor": 2.0}, ("scaling_factor", "2.0", "extend_method", "'None'")),
        ({"attention_dropout_prob": 0.1}, ("attention_dropout_prob", "0.1")),
        ({"hidden_dropout_prob": 1.0}, ("hidden_dropout_prob", "1.0", 0, 1)),
        ({"embed_dropout_prob": -0.1}, ("embed_dropout_prob", "-0.1")),
        ({"hidden_size": 100, "num_heads": 3}, ("hidden_size 100", "num_heads 3")),
        ({"hidden_size": 33, "num_heads": 11}, ("head_dim", 3)),
        ({"num_heads": 32, "n_kv_heads": 5}, ("num_heads 32", "n_kv_heads 5")),
        ({"num_heads": 32, "n_kv_heads": 64}, ("num_heads 32", "n_kv_heads 64")),
        (
            {"use_past": True, "seq_length": 100, "block_size": 16},
            ("seq_length 100", "block_size 16"),
        ),
        ({"num_layers": 0}, ("num_layers", 0, 1)),
        ({"vocab_size": -1}, ("vocab_size", -1)),
        ({"seq_length": "8192"}, ("seq_length", "'8192'")),
        ({"num_heads": 8.0}, ("num_heads", "8.0")),
        ({"n_kv_heads": True}, ("n_kv_heads", "True")),
        ({"intermediate_size": 0}, ("intermediate_size", 0)),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused_with_a_sentence(fields, message):
    with refused(*message):
        TelechatConfig(**fields)


@pytest.mark.parametrize(
    "field",
    [
        "compute_dtype", "param_init_type", "embedding_init_type", "layernorm_compute_type",
        "softmax_compute_type", "rotary_dtype", "res_dtype",
    ],
)  # fmt: skip
def test_dtypes_are_names_of_floats(field):
    assert getattr(TelechatConfig(**{field: "Float16"}), field) == ms.float16
    assert getattr(TelechatConfig(**{field: ms.bfloat16}), field) == ms.bfloat16
    with refused(field, "'int8'", "float32", "float16", "bfloat16"):
        TelechatConfig(**{field: "int8"})


def test_seq_length_need_not_fit_blocks_without_a_cache():
    assert TelechatConfig(seq_length=100, block_size=16).seq_length == 100


def test_what_is_not_given_follows_from_what_is():
    config = TelechatConfig(num_heads=8, hidden_size=64, seq_length=24, param_init_type="float16")
    assert (config.n_kv_heads, config.head_dim, config.max_position_embedding) == (8, 8, 24)
    assert config.embedding_init_type == ms.float16


@pytest.mark.parametrize(
    ("hidden", "multiplier", "multiple_of", "width"),
    [
        (4096, None, 256, 11008),  # int(16384 * 2 / 3) = 10922, rounded up
        (8192, 1.3, 4096, 28672),  # int(1.31 * 32768) = 42926, int(2/3) = 28617, rounded up
        (96, None, 1, 256),
        (96, None, 256, 256),
    ],
)
def test_feed_forward_width_where_none_is_given(hidden, multiplier, multiple_of, width):
    assert feed_forward_width(hidden, multiplier, multiple_of) == width
    config = TelechatConfig(
        hidden_size=hidden, ffn_dim_multiplier=multiplier, multiple_of=multiple_of, num_heads=4
    )
    assert config.intermediate_size == width


def test_keys_that_mindformers_adds_are_accepted():
    """What the Trainer passes to a model's config besides the YAML's own keys."""
    added = {
        "type": "TelechatConfig", "auto_register": "telechat_config.TelechatConfig", "auto_map": {},
        "dataset_config": {"batch_size": 2}, "moe_config": None, "batch_size": 2, "parallel_config": {},
        "checkpoint_name_or_path": "", "disable_lazy_inline": False,
    }  # fmt: skip
    config = TelechatConfig(**added, calculate_per_token_loss=True)
    assert config.batch_size == 2 and config.calculate_per_token_loss is True
    assert isinstance(config.parallel_config, TransformerOpParallelConfig)


sizes = st.fixed_dictionaries(
    {
        "n_kv_heads": st.sampled_from([1, 2, 4, None]),
        "num_heads": st.sampled_from([4, 8]),
        "hidden_size": st.sampled_from([64, 128]),
        "num_layers": st.integers(1, 9),
        "seq_length": st.sampled_from([16, 64]),
        "compute_dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
        "embedding_init_type": st.sampled_from([None, "float16"]),
        "tie_word_embeddings": st.booleans(),
        "use_past": st.booleans(),
        "pad_token_id": st.sampled_from([3, -1]),
        "eos_token_id": st.integers(0, 9),
        "extend_method": st.sampled_from(["None", "PI", "linear", "NTK", "DYNAMIC_NTK"]),
        "document_start_ids": st.lists(st.integers(0, 99), max_size=2),
    }
)


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_a_config_comes_back_from_its_dictionary_and_from_json(fields):
    config = TelechatConfig(**fields)
    fields_of_dict = config.to_dict()
    again = TelechatConfig(**json.loads(json.dumps(fields_of_dict)))
    assert again.to_dict() == fields_of_dict
    assert again.compute_dtype == config.compute_dtype
    assert again.head_dim == config.head_dim


def test_a_saved_config_is_read_again(tmp_path):
    config = TelechatConfig(hidden_size=64, num_heads=4, n_kv_heads=2, compute_dtype="float16")
    config.save_pretrained(str(tmp_path), save_json=True)
    assert TelechatConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()


def test_generate_takes_its_defaults_from_the_config():
    config = TelechatConfig(
        use_past=True, eos_token_id=7, pad_token_id=-1, bos_token_id=5, top_k=9, top_p=0.5, do_sample=True,
        repetition_penalty=1.25, max_decode_length=33,
    )  # fmt: skip
    generation = GenerationConfig.from_model_config(config)
    assert generation.eos_token_id == [7]
    assert (generation.pad_token_id, generation.bos_token_id, generation.use_past) == (-1, 5, True)
    assert (generation.top_k, generation.top_p, generation.do_sample) == (9, 0.5, True)
    assert (generation.repetition_penalty, generation.max_length) == (1.25, 33)
