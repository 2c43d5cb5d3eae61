"""Numbers that the config.json beside weights states reach the answers: epsilon, rotary base, lengths."""

import numpy as np
import pytest
import torch
import yaml
from model_fixtures import RandomModel, prompts
from predict_model import CHECKOUT
from rope_oracle import with_dynamic_ntk

from research.telechat2.infer.loading import load_predictor

BASE, TRAINED = 64, 128
SIZES = {
    "hidden_size": 64, "n_layer": 2, "n_head": 4, "num_key_value_heads": 2, "ffn_hidden_size": 96,
    "vocab_size": 600, "base_seqlen": BASE, "training_seqlen": TRAINED, "seq_length": TRAINED,
}  # fmt: skip
SECTION = {
    "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "intermediate_size": 96,
    "vocab_size": 600, "compute_dtype": "float32", "param_init_type": "float32", "res_dtype": "float32",
}  # fmt: skip


def write_yaml(path, **model_config):
    """A predict YAML of sizes alone over the shipped base, on a CPU."""
    content = {
        "base_config": str(CHECKOUT / "research/telechat2/telechat2-base/predict.yaml"),
        "model": {"model_config": SECTION | model_config},
        "context": {"device_target": "CPU", "jit_config": {"jit_level": "O0"}},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def prefill(model, row: list[int]) -> np.ndarray:
    """Logits ``[V]`` after a prompt whose request has the blocks of its own tokens and no more."""
    size, length = model.config.block_size, len(row)
    tables = np.full((1, model.config.seq_length // size), -1, np.int32)
    tables[0, : -(-length // size)] = np.arange(-(-length // size))
    padded = np.zeros((1, model.config.seq_length), np.int32)
    padded[0, :length] = row
    model.set_dynamic_inputs()
    slots = np.arange(model.config.seq_length)
    logits, _ = model.forward(
        padded, np.array([length]), block_tables=tables, prefill=True, use_past=True,
        slot_mapping=np.where(slots < length, slots, -1),
    )  # fmt: skip
    return logits.asnumpy()[0]


@pytest.mark.parametrize("epsilon", [1e-8, 0.05])
def test_a_yaml_of_sizes_alone_gives_the_releases_logits(tmp_path, small_vocab, capsys, epsilon):
    """Torch's rule: base 64 and trained length 128 stretch every text's rotary base, longer ones' more."""
    random = RandomModel(tmp_path, seed=3, layer_norm_epsilon=epsilon, **SIZES)
    file = write_yaml(tmp_path / "p.yaml")
    for weights in (random.hf, random.weights):  # torch, and converted to a single file
        model = load_predictor(file, small_vocab, weights).model
        said = capsys.readouterr().err
        assert (
            f"rms_norm_eps {epsilon}" in said and "base_seqlen 64" in said and "training_seqlen 128" in said
        )
        assert (model.config.rms_norm_eps, model.config.extend_method) == (epsilon, "DYNAMIC_NTK")
        for row in prompts(1, 600, 12, 64, 100, 128, 192, 400):
            with torch.no_grad():
                oracle = with_dynamic_ntk(random.oracle, -(-len(row) // 16) * 16, TRAINED, BASE)
                expected = oracle(torch.tensor([row])).logits[0, -1].numpy()
            np.testing.assert_allclose(prefill(model, row), expected, rtol=0, atol=2e-5)
