"""YAMLs that run a converted model: its sizes over what all TeleChat2 runs share."""

import yaml

from research.telechat2.checkpoint.relatives.description import Description, model_section
from research.telechat2.text.literal import marker_id

YAMLS = ("predict.yaml", "finetune.yaml")
# What the YAMLs leave to the config.json beside the weights, see config/release.py.
_OF_CONFIG = ("rms_norm_eps", "theta", "extend_method", "scaling_factor")


def yaml_files(description: Description, vocabulary: bytes | None = None) -> dict[str, bytes]:
    """predict.yaml and finetune.yaml of a model: name -> content.

    They state sizes and ids; epsilon and rotary base are read from the config.json beside the weights.
    ``vocabulary``: the tokenizer.model of a Llama, which MindFormers' own LlamaTokenizer reads in prediction.
    """
    section = {key: value for key, value in model_section(description).items() if key not in _OF_CONFIG}
    finetune, predict = dict(section), dict(section)
    if description.origin == "llama":
        end = predict.get("eos_token_id", 0)
        ends = end if isinstance(end, list) else [end]
        padding = finetune.get("pad_token_id", -1)
        if padding < 0 or padding in ends:
            finetune["pad_token_id"] = -1  # no token is padding, and all that no label excludes are trained
            predict["pad_token_id"] = ends[0]  # lengths do not depend on it, see generation/padding.py
    sections = {"finetune": {"model": {"model_config": finetune}}}
    sections["predict"] = {"model": {"model_config": predict}}
    if description.origin == "llama" and vocabulary is not None and (own := _llama_tokenizer(vocabulary)):
        sections["predict"]["processor"] = {"tokenizer": own}
    kind = "a Llama model" if description.origin == "llama" else "a TeleChat model"
    head = f"# Written with the weights from config.json: {kind} of {description.sizes.num_layers} layers.\n"
    return {
        f"{name}.yaml": (
            f"{head}base_config: telechat2-base/{name}.yaml\n\n"
            f"{yaml.safe_dump(section, sort_keys=False, allow_unicode=True)}"
        ).encode()
        for name, section in sections.items()
    }


def _llama_tokenizer(vocabulary: bytes) -> dict | None:
    """The settings of MindFormers' LlamaTokenizer; None for the vocabulary of an exported TeleChat model."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
        if model.get_piece_size() == 0:
            raise RuntimeError("it holds no pieces")
    except RuntimeError as error:
        raise ValueError(
            f"the tokenizer.model beside the weights is not one of SentencePiece ({error})"
        ) from None
    if all(marker_id(model, marker) is not None for marker in ("<_user>", "<_bot>")):
        return None
    start, end, unknown = (
        model.id_to_piece(index) for index in (model.bos_id(), model.eos_id(), model.unk_id())
    )
    return {
        "type": "LlamaTokenizer",
        "bos_token": start,
        "eos_token": end,
        "unk_token": unknown,
        "pad_token": end,
    }
