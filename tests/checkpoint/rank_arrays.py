"""What the ranks of a tensor-parallel group hold, by NumPy from the release's tensors: an oracle of layouts.

Written from the published layout (parameter names and shapes per rank), without the project's table.
"""

from pathlib import Path

import numpy as np
from oracle import stored_tensors

CODES = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}  # bits, never values


def bits_of(path: Path) -> dict[str, np.ndarray]:
    """Name -> bit patterns of the tensors of a file or a folder."""
    return {
        name: np.frombuffer(data, CODES[code]).reshape(shape)
        for name, (code, shape, data) in stored_tensors(path).items()
    }


def whole_model(hf: dict[str, np.ndarray], experts: int = 0) -> dict[str, np.ndarray]:
    """The training model's parameters of an HF folder's tensors."""
    layers = 1 + max(int(name.split(".")[2]) for name in hf if name.startswith("transformer.h."))
    model = {
        "model.tok_embeddings.embedding_weight": hf["transformer.word_embeddings.weight"],
        "model.norm_out.weight": hf["transformer.ln_f.weight"],
    }
    if "lm_head.weight" in hf:
        model["lm_head.weight"] = hf["lm_head.weight"]
    for i in range(layers):
        there, here = f"transformer.h.{i}", f"model.layers.{i}"
        model |= {
            f"{here}.attention_norm.weight": hf[f"{there}.input_layernorm.weight"],
            f"{here}.ffn_norm.weight": hf[f"{there}.post_attention_layernorm.weight"],
            f"{here}.attention.wq.weight": hf[f"{there}.self_attention.query.weight"],
            f"{here}.attention.wk_v.weight": hf[f"{there}.self_attention.key_value.weight"],
            f"{here}.attention.wo.weight": hf[f"{there}.self_attention.dense.weight"],
            f"{here}.attention.wo.bias": hf[f"{there}.self_attention.dense.bias"],
        }
        names = {"w1.weight": "gate_proj.weight", "w3.weight": "up_proj.weight",
                 "w2.weight": "down_proj.weight", "w2.bias": "down_proj.bias"}  # fmt: skip
        if not experts:
            model |= {f"{here}.feed_forward.{ms}": hf[f"{there}.mlp.{pt}"] for ms, pt in names.items()}
            continue
        model[f"{here}.feed_forward.router.dense.weight"] = hf[f"{there}.mlp.router.weight"]
        for ms, pt in names.items():
            stack = np.stack([hf[f"{there}.mlp.local_experts.{e}.{pt}"] for e in range(experts)])
            model[f"{here}.feed_forward.ffn.{ms}"] = stack[None, :, None] if ms == "w2.bias" else stack
    return model


def rank_of(model: dict, n: int, rank: int, kv_heads: int, qkv_concat: bool) -> dict[str, np.ndarray]:
    """What ``rank`` of ``n`` holds of a whole model."""

    def share(array: np.ndarray, axis: int) -> np.ndarray:
        return np.split(array, n, axis)[rank]

    held = {}
    for name, array in model.items():
        experts = ".feed_forward.ffn." in name
        leaf = name.rsplit(".", 2)[1]
        if name.endswith("bias") or "norm" in name or "router" in name:
            held[name] = array
        elif leaf in ("wo", "w2"):  # the input is shared
            held[name] = share(array, 2 if experts else 1)
        else:
            held[name] = share(array, 1 if experts else 0)
    if qkv_concat:
        for name in [name for name in model if name.endswith("attention.wq.weight")]:
            prefix = name.removesuffix("attention.wq.weight")
            key_value = model[f"{prefix}attention.wk_v.weight"]
            packed = key_value.reshape(kv_heads, 2, -1, key_value.shape[1])
            keys, values = (share(packed[:, which], 0).reshape(-1, key_value.shape[1]) for which in (0, 1))
            del held[f"{prefix}attention.wk_v.weight"]
            held[f"{prefix}attention.w_qkv.weight"] = np.concatenate([held.pop(name), keys, values])
            if f"{prefix}feed_forward.w1.weight" in held:
                gate, up = (held.pop(f"{prefix}feed_forward.{w}.weight") for w in ("w1", "w3"))
                held[f"{prefix}feed_forward.w_gate_hidden.weight"] = np.concatenate([gate, up])
    return held


def joined_for(model: dict, n: int, kv_heads: int) -> dict[str, np.ndarray]:
    """A whole model whose joined rows are arranged for ``n`` ranks."""
    ranks = [rank_of(model, n, rank, kv_heads, True) for rank in range(n)]
    return {
        name: np.concatenate([held[name] for held in ranks]) if name not in model else model[name]
        for name in ranks[0]
    }


def save(file: Path, arrays: dict[str, np.ndarray], dtype: str, **metadata: str) -> Path:
    """Write bit patterns as a safetensors file of ``dtype``; ``metadata`` goes into its header."""
    from safetensors import TensorSpec, serialize_file

    file.parent.mkdir(parents=True, exist_ok=True)
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    specs = {
        name: TensorSpec(dtype=dtype, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in held.items()
    }
    serialize_file(specs, file, {"format": "ms", **metadata})
    return file


def save_ranks(folder: Path, model: dict, n: int, kv_heads: int, qkv_concat: bool, dtype: str) -> Path:
    """Write ``rank_<r>/checkpoint_<r>.safetensors`` for ``n`` ranks."""
    recorded = {"tensor_parallel": str(n)} | ({"qkv_concat": str(n)} if qkv_concat else {})
    for rank in range(n):
        held = rank_of(model, n, rank, kv_heads, qkv_concat)
        save(folder / f"rank_{rank}" / f"checkpoint_{rank}.safetensors", held, dtype, **recorded)
    return folder
