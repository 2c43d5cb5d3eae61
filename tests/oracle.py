"""The independent oracle: random TeleChat2 folders in Hugging Face form, and the same as a LlamaForCausalLM.

Written from the published layout of the torch release, without the project's conversion table, so that a
mistake in the table cannot hide in the oracle. A TeleChat2 dense model *is* a Llama with biases on the
output and down projections, once the packed ``key_value`` rows are taken apart per kv head.
"""

import json
from pathlib import Path

import numpy as np


def hf_config(sizes: dict, tied: bool = False) -> dict:
    """config.json of a folder: the released model's keys, with ``sizes`` laid over the defaults."""
    config = {
        "architectures": ["TelechatForCausalLM"],
        "model_type": "telechat",
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "ffn_hidden_size": 96,
        "vocab_size": 128,
        "layer_norm_epsilon": 1e-5,
        "seq_length": 512,
        "base_seqlen": 512,
        "training_seqlen": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "unk_token_id": 0,
        "embed_layernorm": False,
        "tie_word_embeddings": tied,
    }
    return config | sizes


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, in the order of the release."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    kv_rows = 2 * config.get("num_key_value_heads", config["n_head"]) * (hidden // config["n_head"])
    shapes = {"transformer.word_embeddings.weight": (vocab, hidden)}
    for layer in range(config["n_layer"]):
        shapes |= {
            f"transformer.h.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (hidden,),
                "post_attention_layernorm.weight": (hidden,),
                "self_attention.dense.weight": (hidden, hidden),
                "self_attention.dense.bias": (hidden,),
                "self_attention.query.weight": (hidden, hidden),
                "self_attention.key_value.weight": (kv_rows, hidden),
                **_feed_forward_shapes(config),
            }.items()
        }
    shapes["transformer.ln_f.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _feed_forward_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer's dense block; with ``num_experts`` those of its router and of every expert."""
    hidden, ffn = config["hidden_size"], config["ffn_hidden_size"]
    if "num_experts" not in config:
        return {
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
            "mlp.down_proj.bias": (hidden,),
            "mlp.up_proj.weight": (ffn, hidden),
        }
    shapes = {"mlp.router.weight": (config["num_experts"], hidden)}
    for expert in range(config["num_experts"]):
        prefix = f"mlp.local_experts.{expert}"
        shapes |= {
            f"{prefix}.gate_proj.weight": (ffn, hidden),
            f"{prefix}.up_proj.weight": (ffn, hidden),
            f"{prefix}.down_proj.weight": (hidden, ffn),
            f"{prefix}.down_proj.bias": (hidden,),
        }
    return shapes


def _random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Activations and logits near unit standard deviation, biases and norms far from trivial."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith(".bias"):
        return values * np.float32(0.1)
    if len(shape) == 1:
        return 1 + values * np.float32(0.1)
    return values / np.float32(np.sqrt(shape[1]))


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # random values: cutting the low half is as random as rounding it
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def _write_safetensors(file: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    from safetensors import TensorSpec, serialize_file

    specs = {
        name: TensorSpec(dtype=dtype, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in tensors.items()
    }
    serialize_file(specs, file, {"format": "pt"})


def write_hf_folder(
    folder: Path, sizes: dict, seed: int, dtype: str = "float32", shards: int = 1, tied: bool = False
) -> None:
    """Write a random TeleChat2 model as the torch release stores it: config.json and safetensors.

    ``sizes`` holds config.json keys: ``hidden_size, n_layer, n_head, num_key_value_heads`` (absent: n_head),
    ``ffn_hidden_size, vocab_size``, and whatever else config.json should say (``layer_norm_epsilon``, …).
    ``num_experts`` (with ``num_experts_per_tok``) makes it a mixture of experts in every layer, each expert
    ``ffn_hidden_size`` wide.
    Every bias and norm is random too. ``shards`` > 1 writes that many files and an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(sizes, tied)
    rng = np.random.default_rng(seed)
    tensors = {
        name: _stored(_random_tensor(rng, name, shape), dtype) for name, shape in hf_shapes(config).items()
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if shards == 1:
        _write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        _write_safetensors(folder / file, {name: tensors[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def stored_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of a safetensors file or a folder of them, read by the library."""
    from safetensors import deserialize

    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {
        name: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for file in files
        for name, entry in deserialize(file.read_bytes())
    }


def read_hf_folder(folder: Path) -> tuple[dict, dict]:
    """config.json and every tensor of a folder, as fp32 torch tensors."""
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return config, tensors


def load_llama(folder: Path, rope_theta: float = 10000.0):
    """An HF TeleChat2 folder as ``transformers.LlamaForCausalLM``: fp32, eager attention, eval mode.

    Exact for the dense models; the biases TeleChat2 lacks (q, k, v, gate, up) are zeros.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config, telechat = read_hf_folder(folder)
    n_heads, hidden = config["n_head"], config["hidden_size"]
    n_kv_heads, head_dim = config.get("num_key_value_heads", n_heads), hidden // n_heads
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["n_layer"],
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config["layer_norm_epsilon"],
            rope_theta=rope_theta,
            max_position_embeddings=config["seq_length"],
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=config["tie_word_embeddings"],
            bos_token_id=config["bos_token_id"],
            eos_token_id=config["eos_token_id"],
            pad_token_id=None,  # a padding row of the embedding would lose its gradient
            attn_implementation="eager",
        )
    )
    state = {
        "model.embed_tokens.weight": telechat["transformer.word_embeddings.weight"],
        "model.norm.weight": telechat["transformer.ln_f.weight"],
    }
    state["lm_head.weight"] = telechat.get("lm_head.weight", state["model.embed_tokens.weight"])
    for layer in range(config["n_layer"]):
        there, here = f"transformer.h.{layer}", f"model.layers.{layer}"
        key_value = telechat[f"{there}.self_attention.key_value.weight"].view(n_kv_heads, 2, head_dim, hidden)
        state |= {
            f"{here}.input_layernorm.weight": telechat[f"{there}.input_layernorm.weight"],
            f"{here}.post_attention_layernorm.weight": telechat[f"{there}.post_attention_layernorm.weight"],
            f"{here}.self_attn.q_proj.weight": telechat[f"{there}.self_attention.query.weight"],
            f"{here}.self_attn.q_proj.bias": torch.zeros(n_heads * head_dim),
            f"{here}.self_attn.k_proj.weight": key_value[:, 0].reshape(n_kv_heads * head_dim, hidden),
            f"{here}.self_attn.k_proj.bias": torch.zeros(n_kv_heads * head_dim),
            f"{here}.self_attn.v_proj.weight": key_value[:, 1].reshape(n_kv_heads * head_dim, hidden),
            f"{here}.self_attn.v_proj.bias": torch.zeros(n_kv_heads * head_dim),
            f"{here}.self_attn.o_proj.weight": telechat[f"{there}.self_attention.dense.weight"],
            f"{here}.self_attn.o_proj.bias": telechat[f"{there}.self_attention.dense.bias"],
            f"{here}.mlp.gate_proj.weight": telechat[f"{there}.mlp.gate_proj.weight"],
            f"{here}.mlp.gate_proj.bias": torch.zeros(config["ffn_hidden_size"]),
            f"{here}.mlp.up_proj.weight": telechat[f"{there}.mlp.up_proj.weight"],
            f"{here}.mlp.up_proj.bias": torch.zeros(config["ffn_hidden_size"]),
            f"{here}.mlp.down_proj.weight": telechat[f"{there}.mlp.down_proj.weight"],
            f"{here}.mlp.down_proj.bias": telechat[f"{there}.mlp.down_proj.bias"],
        }
    model.load_state_dict(state, strict=True)
    return model.eval()


def shared_gradients(oracle, sizes: dict, half_split=lambda rows, heads: rows) -> dict[str, np.ndarray]:
    """Gradients of all but the feed-forward blocks, under our names, after ``backward`` on ``oracle``.

    Keys and values are packed per head, as the release stores them. ``half_split(rows, heads)`` takes the
    query and key rows to the order of the release, where the oracle's is another.
    """
    import torch

    heads = sizes["n_head"]
    kv_heads = sizes.get("num_key_value_heads", heads)
    head_dim = sizes["hidden_size"] // heads
    grads = {
        "model.tok_embeddings.embedding_weight": oracle.model.embed_tokens.weight.grad,
        "model.norm_out.weight": oracle.model.norm.weight.grad,
    }
    if not sizes["tie_word_embeddings"]:
        grads["lm_head.weight"] = oracle.lm_head.weight.grad
    for i, layer in enumerate(oracle.model.layers):
        attention, prefix = layer.self_attn, f"model.layers.{i}"
        keys, rows = half_split(attention.k_proj.weight.grad, kv_heads), []
        for g in range(kv_heads):
            head = slice(g * head_dim, (g + 1) * head_dim)
            rows += [keys[head], attention.v_proj.weight.grad[head]]
        grads |= {
            f"{prefix}.attention_norm.weight": layer.input_layernorm.weight.grad,
            f"{prefix}.attention.wq.weight": half_split(attention.q_proj.weight.grad, heads),
            f"{prefix}.attention.wk_v.weight": torch.cat(rows),
            f"{prefix}.attention.wo.weight": attention.o_proj.weight.grad,
            f"{prefix}.attention.wo.bias": attention.o_proj.bias.grad,
            f"{prefix}.ffn_norm.weight": layer.post_attention_layernorm.weight.grad,
        }
    return {name: grad.numpy() for name, grad in grads.items()}


def llama_gradients(oracle, sizes: dict) -> dict[str, np.ndarray]:
    """Every gradient of ``load_llama``'s model under our names, after ``backward``."""
    grads = shared_gradients(oracle, sizes)
    for i, layer in enumerate(oracle.model.layers):
        mlp, prefix = layer.mlp, f"model.layers.{i}.feed_forward"
        grads |= {
            f"{prefix}.w1.weight": mlp.gate_proj.weight.grad.numpy(),
            f"{prefix}.w3.weight": mlp.up_proj.weight.grad.numpy(),
            f"{prefix}.w2.weight": mlp.down_proj.weight.grad.numpy(),
            f"{prefix}.w2.bias": mlp.down_proj.bias.grad.numpy(),
        }
    return grads
