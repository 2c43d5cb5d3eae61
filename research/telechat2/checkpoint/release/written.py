"""The config.json of weights that were trained here, so that their numbers go with them."""

from typing import Any

from research.telechat2.checkpoint.release.description import LENGTHS
from research.telechat2.checkpoint.release.llama_config import is_llama
from research.telechat2.checkpoint.release.rotary import llama_scaling
from research.telechat2.checkpoint.release.values import Config
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.release import FAMILY_THETA
from research.telechat2.config.rope import stretch_factor, yarn_settings

# TeleChat's spelling of a field; what it has none for is written in MindFormers' own, which is read as well.
_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "n_kv_heads": "num_key_value_heads",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tie_word_embeddings",
    "rms_norm_eps": "layer_norm_epsilon",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "seq_length": "seq_length",
}


def trained_config(fields: ModelSettings, source: Config | None, from_scratch: bool) -> dict[str, Any]:
    """config.json of a training's output, in the spelling of the torch release.

    Args:
        fields: TelechatConfig of the run.
        source: the config.json of the weights that it began with; None where there is none.
        from_scratch: the run began with random weights, so that it was trained at its own ``seq_length``.

    Returns:
        ``source`` with what the YAML alone states; without a source a config of all fields. The lengths of
        the release are not made up where they are not known: the config then names the rotary base itself.
    """
    rotary = _rotary(fields, from_scratch)
    if source is not None and is_llama(source):
        return dict(source) | _llama_extension(fields, source)
    if source is not None:
        own_base = source.get("theta") is None and fields.theta != FAMILY_THETA
        lengths = dict.fromkeys(LENGTHS, fields.max_position_embedding) if own_base else {}
        return dict(source) | {key: value for key, value in rotary.items() if key not in source} | lengths
    content: dict[str, Any] = {"architectures": ["TelechatForCausalLM"], "model_type": "telechat"}
    content |= {theirs: getattr(fields, ours) for ours, theirs in _FIELDS.items()}
    if fields.moe:
        content |= {"num_experts": fields.moe.num_experts, "num_experts_per_tok": fields.moe.top_k}
    return content | rotary


def _llama_extension(fields: ModelSettings, source: Config) -> dict[str, Any]:
    """``rope_scaling`` where the YAML alone extends a Llama."""
    if fields.extend_method not in ("PI", "linear", "YARN") or source.get("rope_scaling"):
        return {}
    settings = yarn_settings(fields) if fields.extend_method == "YARN" else stretch_factor(fields)
    method = "YARN" if fields.extend_method == "YARN" else "PI"
    return {"rope_scaling": llama_scaling(fields.theta, (method, settings))[1]}


def _rotary(fields: ModelSettings, from_scratch: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if fields.extend_method not in ("None", "DYNAMIC_NTK"):
        found = {"extend_method": fields.extend_method, "scaling_factor": fields.scaling_factor}
    if fields.base_seqlen is not None:
        found |= {name: getattr(fields, name) for name in LENGTHS}
    elif from_scratch:
        found |= dict.fromkeys(LENGTHS, fields.max_position_embedding)
    if fields.theta != FAMILY_THETA or "base_seqlen" not in found:
        found["theta"] = fields.theta
    return found
