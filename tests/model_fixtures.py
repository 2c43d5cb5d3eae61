"""What the model's tests share: random models from the oracle's folders, and the contexts they run in."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import torch
from mindspore import Parameter, Tensor
from oracle import load_llama, write_hf_folder
from oracle_moe import load_ernie

from research.telechat2.checkpoint.convert import convert_to_mindspore, read_mindspore_tensors
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig

PAD = 3
NO_WEIGHTS = ("_cache", "expert_load")  # what a model fills itself
FP32 = {"compute_dtype": "float32", "param_init_type": "float32"}


class RandomModel:
    """One random model, as the oracle's folder ``hf``, as the oracle, and as ours through the converter.

    A mixture of experts if ``sizes`` hold ``num_experts`` (and ``num_experts_per_tok``).
    """

    def __init__(self, folder: Path, seed: int = 0, tied: bool = False, **sizes):
        self.hf, self.weights = folder / "hf", folder / "ms.safetensors"
        write_hf_folder(self.hf, sizes, seed=seed, tied=tied)
        convert_to_mindspore(self.hf, self.weights)
        self.oracle = load_ernie(self.hf) if "num_experts" in sizes else load_llama(self.hf)
        self.sizes = json.loads((self.hf / "config.json").read_text())

    def config(self, moe_config: dict | None = None, **more) -> TelechatConfig:
        """The model's sizes in fp32, and ``more``; ``moe_config`` is laid over the number of experts."""
        sizes = self.sizes
        if "num_experts" in sizes:
            moe_config = {
                "expert_num": sizes["num_experts"],
                "num_experts_chosen": sizes["num_experts_per_tok"],
                "routing_policy": "TopkRouterV2",
                **(moe_config or {}),
            }
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
                "moe_config": moe_config,
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
        assert not foreign and all(name.endswith(NO_WEIGHTS) for name in missing)
        return model.set_train(False)


def int32(values) -> Tensor:
    return Tensor(np.asarray(values, np.int32))


def loss_and_gradients(model):
    """A function of ids and labels: the loss, and the gradient of every parameter by name, in training."""
    model.set_train(True)
    parameters = model.trainable_params()
    function = ms.value_and_grad(model, None, parameters)

    def call(ids, labels=None):
        loss, gradients = function(int32(ids), None if labels is None else int32(labels))
        names = [parameter.name for parameter in parameters]
        return loss.asnumpy(), dict(zip(names, (g.asnumpy() for g in gradients), strict=True))

    return call


def assert_same_gradients(found: dict, expected: dict) -> None:
    """Every gradient within 1e-4 of the expected one, relative to its norm."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert np.linalg.norm(found[name] - grad) <= 1e-4 * np.linalg.norm(grad), name


def prompts(seed: int, vocab_size: int, *lengths: int) -> list[list[int]]:
    """Rows of random ids that are no special ones."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocab_size, length).tolist() for length in lengths]


def generate(model, rows: list[list[int]], max_new_tokens: int, eos: int = -1) -> list[list[int]]:
    """Greedy answers of our model to a batch, prompts included."""
    longest = max(map(len, rows))
    padded = [row + [PAD] * (longest - len(row)) for row in rows]
    answers = model.generate(
        padded, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=[eos], pad_token_id=PAD
    )
    return [answer.tolist() for answer in answers]


def oracle_generate(random: RandomModel, row: list[int], max_new_tokens: int, eos=None) -> list[int]:
    """The oracle's greedy answer to one prompt, the prompt included."""
    tokens = torch.tensor([row])
    answer = random.oracle.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=eos, pad_token_id=PAD,
    )  # fmt: skip
    return answer[0].tolist()
