"""What this plugin changes in MindFormers 1.9 for good: how it reads prompts and loads weights of our models.

Importing a module changes nothing. A model of ours calls ``install`` when it is built, whoever builds it: a
command, MindFormers by a YAML that names our register, or MindIE's ModelRunner. Models of any other class go
MindFormers' own way.
"""

from functools import cache

from mindformers import model_runner
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.pipeline.text_generation_pipeline import TextGenerationPipeline


class PluginModel(PreTrainedModel):
    """MindFormers' model as the base of this plugin's models: what ``install`` reroutes MindFormers for.

    Attributes:
        rows: makes of the prompts' ids, a list for each, what ``generate`` takes with every row's length.
    """

    rows: type = list

    def __init__(self, *args, **kwargs):
        install()
        super().__init__(*args, **kwargs)


@cache
def install() -> None:
    """Reroute the pipeline that the Trainer predicts with, and ModelRunner's loader; once in a process."""
    _install_pipeline()
    _install_loader()


def _install_pipeline() -> None:
    """Keep the length of every prompt, and answer any number of prompts.

    MindFormers pads by the tokenizer's padding id, and ``generate`` measures by the model's; a number of
    prompts that the batch size does not divide is an error there.
    """
    preprocess_by_library = TextGenerationPipeline.preprocess
    run_multi_by_library = TextGenerationPipeline.run_multi

    def preprocess(self, inputs, **parameters):
        if not isinstance(self.network, PluginModel) or isinstance(inputs, dict):
            return preprocess_by_library(self, inputs, **parameters)
        special = parameters.get("add_special_tokens", True)
        prompts = [inputs] if isinstance(inputs, str) else inputs
        ids = (self.tokenizer(prompt, return_tensors=None, add_special_tokens=special) for prompt in prompts)
        return {"input_ids": self.network.rows(list(each["input_ids"]) for each in ids)}

    def run_multi(self, inputs, batch_size, *parameters):
        rest = len(inputs) % batch_size if isinstance(self.network, PluginModel) else 0
        outputs = run_multi_by_library(self, inputs[: len(inputs) - rest], batch_size, *parameters)
        return outputs + self.run_single(inputs[-rest:], *parameters) if rest else outputs

    TextGenerationPipeline.preprocess = preprocess
    TextGenerationPipeline.run_multi = run_multi


def _install_loader() -> None:
    """Load for ModelRunner through ``network.load_weights(path)`` where a model of ours has it.

    MindFormers' own loader leaves parameters random whose names it does not find, and cuts weights only by
    strategies of another model.
    """
    load_by_library = model_runner.transform_and_load_checkpoint

    def load(config, model, network, *args, **kwargs):
        if isinstance(network, PluginModel) and hasattr(network, "load_weights"):
            return network.load_weights(config.checkpoint.load_path)
        return load_by_library(config, model, network, *args, **kwargs)

    model_runner.transform_and_load_checkpoint = load
