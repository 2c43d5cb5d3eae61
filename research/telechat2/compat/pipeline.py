"""How MindFormers' pipeline, which its Trainer predicts with, reads the prompts of our models."""

from mindformers.pipeline.text_generation_pipeline import TextGenerationPipeline

_preprocess_by_library = TextGenerationPipeline.preprocess
_run_multi_by_library = TextGenerationPipeline.run_multi


def read_as_rows(kind: type, rows: type) -> None:
    """Have the pipeline of a model of class ``kind`` keep every row's length, and answer any number of rows.

    MindFormers pads by the tokenizer's padding id, and ``generate`` measures by the model's; a number of
    prompts that the batch size does not divide is an error there.
    """

    def preprocess(self, inputs, **parameters):
        if not isinstance(self.network, kind) or isinstance(inputs, dict):
            return _preprocess_by_library(self, inputs, **parameters)
        special = parameters.get("add_special_tokens", True)
        prompts = [inputs] if isinstance(inputs, str) else inputs
        return {
            "input_ids": rows(
                list(self.tokenizer(prompt, return_tensors=None, add_special_tokens=special)["input_ids"])
                for prompt in prompts
            )
        }

    def run_multi(self, inputs, batch_size, *parameters):
        left = len(inputs) % batch_size if isinstance(self.network, kind) else 0
        outputs = _run_multi_by_library(self, inputs[: len(inputs) - left], batch_size, *parameters)
        return outputs + self.run_single(inputs[-left:], *parameters) if left else outputs

    TextGenerationPipeline.preprocess = preprocess
    TextGenerationPipeline.run_multi = run_multi
