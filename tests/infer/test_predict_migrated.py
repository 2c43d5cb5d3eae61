"""The predict YAML of MindFormers v1.6.0 answers with a small model, its other lines as they are."""

from pathlib import Path

import pytest
import yaml
from predict_model import QUESTIONS, SIZES, asked, oracle_answer

from research.telechat2.infer.loading import load_predictor

MODEL = {
    "seq_length": 256, "hidden_size": SIZES["hidden_size"], "num_layers": SIZES["n_layer"],
    "num_heads": SIZES["n_head"], "n_kv_heads": SIZES["num_key_value_heads"],
    "intermediate_size": SIZES["ffn_hidden_size"], "vocab_size": SIZES["vocab_size"],
}  # fmt: skip
FILE = Path(__file__).resolve().parents[3] / "shared/data/migration/predict_telechat_39b_a12b_parallel.yaml"


@pytest.mark.skipif(not FILE.is_file(), reason="the public YAMLs are not here")
def test_a_published_yaml_answers(random, small_vocab, tmp_path, capsys):
    """The parallel YAML, which names no auto_register; one process, and a dense model."""
    settings = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    del settings["moe_config"]
    dtypes = ("compute_dtype", "param_init_type", "res_dtype", "rotary_dtype")
    settings["model"]["model_config"] |= MODEL | dict.fromkeys(dtypes, "float32") | {"num_blocks": 64}
    settings["context"]["device_target"] = "CPU"
    settings["use_parallel"] = False
    settings["load_checkpoint"] = str(random.weights)
    settings["processor"]["tokenizer"]["vocab_file"] = str(small_vocab)
    path = tmp_path / "migrated.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    predictor = load_predictor(path, generation={"max_new_tokens": 4})
    assert type(predictor.model).__name__ == "ParallelTelechatForCausalLM"
    assert "pretrain_seqlen has no effect" in capsys.readouterr().err
    prompt = predictor.prompt_ids(asked(QUESTIONS[0]))
    assert predictor.generate([prompt])[0].ids == oracle_answer(random, prompt, 4)
