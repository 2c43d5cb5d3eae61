"""The small model of the tests that run commands: its sizes, and a checkpoint of random weights."""

from pathlib import Path

from oracle import write_hf_folder

from research.telechat2.checkpoint.convert import convert_to_mindspore

SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "n_kv_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 600,
}
HF_NAMES = {
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "n_kv_heads": "num_key_value_heads",
    "intermediate_size": "ffn_hidden_size",
}


def write_weights(folder: Path, **more) -> Path:
    """Write random weights of SIZES; the folder of model.safetensors, beside the ``torch`` original.

    ``more``: further keys of config.json, such as ``num_experts``.
    """
    sizes = {HF_NAMES.get(name, name): size for name, size in SIZES.items()}
    write_hf_folder(folder / "torch", sizes | more, seed=0)
    convert_to_mindspore(folder / "torch", folder / "ms")
    return folder / "ms"
