"""YAMLs that run a converted model: its sizes over what all TeleChat2 runs share."""

import yaml

from research.telechat2.checkpoint.relatives.description import Description, model_section

KINDS = ("predict", "finetune")


def yaml_files(description: Description) -> dict[str, bytes]:
    """predict.yaml and finetune.yaml of a model: name -> content."""
    section = yaml.safe_dump({"model": {"model_config": model_section(description)}}, sort_keys=False)
    sizes = description.sizes
    model = "a Llama model" if description.origin == "llama" else "a TeleChat model"
    head = f"# Written with the weights from config.json: {model} of {sizes.num_layers} layers.\n"
    return {
        f"{kind}.yaml": f"{head}base_config: telechat2-base/{kind}.yaml\n\n{section}".encode()
        for kind in KINDS
    }
