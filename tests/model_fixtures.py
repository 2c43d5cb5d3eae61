"""What the model's tests share: random models from the oracle's folders, and the contexts they run in."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from oracle import load_llama, write_hf_folder

from research.telechat2.checkpoint import convert_to_mindspore, read_mindspore_tensors
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

FP32 = {"compute_dtype": "float32", "param_init_type": "float32"}


class RandomModel:
    """One random model, as the oracle's folder ``hf``, as the oracle, and as ours through the converter."""

    def __init__(self, folder: Path, seed: int = 0, tied: bool = False, **sizes):
        self.hf, self.weights = folder / "hf", folder / "ms.safetensors"
        write_hf_folder(self.hf, sizes, seed=seed, tied=tied)
        convert_to_mindspore(self.hf, self.weights)
        self.oracle = load_llama(self.hf)
        self.sizes = json.loads((self.hf / "config.json").read_text())

    def config(self, **more) -> TelechatConfig:
        sizes = self.sizes
        return TelechatConfig(
            **{
                "hidden_size": sizes["hidden_size"],
                "num_layers": sizes["n_layer"],
                "num_heads": sizes["n_head"],
                "n_kv_heads": sizes.get("num_key_value_heads"),
                "intermediate_size": sizes["ffn_hidden_size"],
                "vocab_size": sizes["vocab_size"],
                "rms_norm_eps": sizes["layer_norm_epsilon"],
                "tie_word_embeddings": sizes["tie_word_embeddings"],
                **FP32,
                **more,
            }
        )

    def tensors(self):
        """Our names and arrays."""
        return read_mindspore_tensors(self.weights)

    def build(self, **more) -> TelechatForCausalLM:
        """Our model with the converted weights, in evaluation mode."""
        model = TelechatForCausalLM(self.config(**more))
        weights = {name: Parameter(Tensor(array)) for name, array in self.tensors()}
        missing, foreign = ms.load_param_into_net(model, weights)
        assert not foreign and all(name.endswith("_cache") for name in missing)
        return model.set_train(False)


def int32(values) -> Tensor:
    return Tensor(np.asarray(values, np.int32))
