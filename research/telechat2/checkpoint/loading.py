"""Weights into a model that is built: names and shapes first, then one tensor in memory at a time."""

from collections.abc import Mapping

import numpy as np

from research.telechat2.checkpoint.dtypes import WIDTH
from research.telechat2.checkpoint.sizes import TelechatSizes
from research.telechat2.checkpoint.stored import StoredTensor

NO_WEIGHTS = ("_cache", "expert_load")  # parameters that a model fills itself


def sizes_of_model(config) -> TelechatSizes:
    """The sizes of a TelechatConfig's model."""
    return TelechatSizes(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        kv_size=config.n_kv_heads * config.head_dim,
        num_heads=config.num_heads,
        n_kv_heads=config.n_kv_heads,
        tie_word_embeddings=config.tie_word_embeddings,
        num_experts=config.moe.num_experts if config.moe else 0,
    )


def load_tensors(model, tensors: Mapping[str, StoredTensor], origin: str) -> None:
    """Fill every parameter of ``model`` but its caches, each in the dtype that it has.

    Args:
        model: a MindSpore cell, whose parameters need no data yet.
        tensors: by the names of the parameters.
        origin: what messages call the checkpoint.

    Raises:
        ValueError: names or shapes are not the model's (nothing is loaded then), or a value is beyond the
            range of the parameter's dtype.
    """
    parameters = {name: p for name, p in model.parameters_and_names() if not name.endswith(NO_WEIGHTS)}
    _compare(parameters, tensors, origin)
    for name, tensor in tensors.items():
        parameters[name].set_data(_as_tensor(tensor, parameters[name].dtype))
    model.init_parameters_data()


def _as_tensor(tensor: StoredTensor, dtype):
    from mindspore import Tensor
    from mindspore.common.np_dtype import bfloat16

    target = str(dtype).lower()
    assert target in WIDTH
    content = np.frombuffer(tensor.read(target), bfloat16 if target == "bfloat16" else target)
    return Tensor(content.reshape(tensor.shape))


def _compare(parameters: Mapping, tensors: Mapping[str, StoredTensor], origin: str) -> None:
    problems = [f"{name} is not in the model" for name in tensors if name not in parameters]
    problems += [
        f"{name} is {list(tensor.shape)}, expected {list(parameters[name].shape)}"
        for name, tensor in tensors.items()
        if name in parameters and tuple(parameters[name].shape) != tensor.shape
    ]
    problems += [f"{name} is missing" for name in parameters if name not in tensors]
    if problems:
        listed = "; ".join(problems[:10])
        raise ValueError(
            f"{origin} does not fit the model of the YAML, {len(problems)} tensors differ: {listed}"
            f"{'; …' if len(problems) > 10 else ''}. Use the YAML of this checkpoint's size and kind, "
            f"dense or mixture of experts."
        )
