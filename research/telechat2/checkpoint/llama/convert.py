"""Llama checkpoints in and out: any of them to MindSpore, and a TeleChat model to a Hugging Face folder."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from research.telechat2.checkpoint.job.job import Job, Options, Written
from research.telechat2.checkpoint.job.output import deal
from research.telechat2.checkpoint.job.run import run_job
from research.telechat2.checkpoint.layouts.read import plan_mindspore
from research.telechat2.checkpoint.llama.weights import (
    ATTENTION_ZEROS,
    MLP_ZEROS,
    from_llama,
    to_llama,
    with_needed_biases,
)
from research.telechat2.checkpoint.plan import Plan, make_plan
from research.telechat2.checkpoint.release.companion_files import (
    GENERATION,
    MODEL,
    companions,
    config_name,
    exported_tokenizer,
    generation_config,
    model_notes,
    prompt_format_file,
    vocabulary_notes,
    yaml_files,
)
from research.telechat2.checkpoint.release.description import (
    Description,
    describe_fields,
    describe_telechat,
    lost_ids,
)
from research.telechat2.checkpoint.release.kinds import is_mistral
from research.telechat2.checkpoint.release.llama_config import (
    describe_llama,
    is_llama,
    llama_config,
    unread_keys,
)
from research.telechat2.checkpoint.release.stated import said_of
from research.telechat2.checkpoint.release.values import Config
from research.telechat2.checkpoint.sizes import CONFIG, TelechatSizes, config_beside
from research.telechat2.checkpoint.storage.folders import read_torch_source
from research.telechat2.checkpoint.storage.tensor import StoredTensor, Weights
from research.telechat2.common.errors import UsageError, naming
from research.telechat2.common.files import json_bytes, read_json
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.config.preflight import read_settings
from research.telechat2.config.release import settle_model
from research.telechat2.config.settings import model_config, with_defaults
from research.telechat2.config.yaml_files import resolve_config
from research.telechat2.text import prompt_format as prompt_formats


def holds_llama(path: Path) -> bool:
    """Whether the config.json of a checkpoint says that it is a Llama model."""
    file = config_beside(path)
    if file is None:
        return False
    with naming(file):
        return is_llama(read_json(file) or {})


def import_llama(source: Path, target: Path, options: Options, as_ckpt: bool = False) -> Written:
    """Convert the Hugging Face folder of a Llama model to a MindSpore checkpoint of TelechatForCausalLM.

    ``source`` has a config.json, see ``holds_llama``. ``target`` is a file (``.safetensors``, ``.ckpt``) or a
    folder, which also receives config.json and the tokenizer as they are, and YAMLs that run the model.

    Raises:
        UsageError: a model that TeleChat's layers cannot express, a broken source, or a target that exists.
    """
    file = _config_of(source, None)
    config, generation = read_json(file) or {}, read_json(file.parent / GENERATION)
    with naming(file):
        description = describe_llama(config, generation)
    imported = from_llama(read_torch_source(source), description, str(source))
    plan = make_plan(imported.tensors, "torch", description.sizes, str(source))
    sources = dict(imported.sources)
    if plan.sizes.tie_word_embeddings:
        sources.pop("lm_head.weight", None)  # found equal to the embeddings
    folder, files = deal(target, plan.weights, options, source, (".safetensors", ".ckpt"), as_ckpt)

    def back(tensors: list[StoredTensor]) -> Weights:
        weights = make_plan(tensors, "mindspore", plan.sizes, f"what was written to {folder}").weights
        return [(part, name) for part, name in to_llama(weights, description) if name in sources]

    ignored = {**imported.ignored, **plan.ignored}
    name = config_name(target, folder)
    beside, notes = {name: file.read_bytes()}, _notes(description, plan, ignored)
    if folder != target:
        notes.append(f"config.json goes along with the weights, as {name}")
    if not description.attention_bias or not description.mlp_bias:
        notes.append("biases of wo and w2, which this model lacks, are zeros")
    if unread := unread_keys(config):
        notes.append(f"keys of {CONFIG} without a counterpart: {', '.join(unread)}")
    if folder == target:
        along = companions(file.parent)
        yamls = yaml_files(description, along.get(MODEL))
        beside |= along | yamls | prompt_format_file(prompt_formats.find(source), folder)
        notes.append(
            f"{' and '.join(yamls)} run this model; {CONFIG} and tokenizer go along with the weights"
        )
        notes += [*vocabulary_notes(along, plan.sizes.vocab_size), *lost_ids(description)]
    job = Job(source, sources, files, back, "ms", beside, notes=tuple(notes), ignored=ignored)
    return run_job(job, folder, options)


def export_llama(
    source: Path,
    target: Path,
    options: Options,
    config: Path | None = None,
    vocab_file: Path | None = None,
) -> Written:
    """Convert a MindSpore checkpoint of a dense model to the folder of a Hugging Face LlamaForCausalLM.

    Exact: the same logits, up to the length the model was trained at. ``config`` is a config.json or the YAML
    the model was trained with, by default the config.json beside the weights; ``vocab_file`` the
    tokenizer.model, by default the tokenizer beside that config.

    Raises:
        UsageError: a mixture of experts, no config, a broken source, or a target that exists.
    """
    if target.suffix in (".safetensors", ".bin"):
        raise UsageError(
            f"{target} names one file, but a Llama model is a folder with its config; give a folder"
        )
    file = _config_of(source, config)
    plan, description, lines = _described(source, file)
    description = with_needed_biases(plan.weights, description)
    weights = to_llama(plan.weights, description)
    folder, files = deal(target, weights, options, source)

    def back(tensors: list[StoredTensor]) -> Weights:
        imported = from_llama(tensors, description, f"what was written to {folder}")
        return make_plan(imported.tensors, "torch", plan.sizes, f"what was written to {folder}").weights

    prompt_format = prompt_formats.find(source)
    home = file.parent if file.suffix == ".json" else _folder_of(source)
    tokenizer, tokenizer_notes = exported_tokenizer(home, vocab_file, description, prompt_format)
    dtype = options.dtype or Counter(tensor.dtype for tensor, _ in weights).most_common(1)[0][0]
    beside = {
        CONFIG: _exported_config(file, description, dtype),
        **generation_config(home, description),
        **tokenizer,
        **prompt_format_file(prompt_format, folder),
    }
    notes = (*_notes(description, plan, plan.ignored), *lines, *_export_notes(weights, description),
             *tokenizer_notes)  # fmt: skip
    job = Job(source, plan.named_sources, files, back, "pt", beside, notes=notes, ignored=plan.ignored)
    return run_job(job, folder, options)


def _folder_of(path: Path) -> Path:
    """The folder that a checkpoint's config lies in."""
    return path if path.is_dir() else path.parent


def _config_of(source: Path, config: Path | None) -> Path:
    """The file that describes the model: a config.json, or a YAML, which may be a shipped one's name."""
    if config is not None and config.suffix in (".yaml", ".yml"):
        return resolve_config(str(config), Path.cwd())
    file = config or config_beside(source) or _folder_of(source) / CONFIG
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist, and the weights alone do not tell how many heads the model has; name "
            "its config.json, or the YAML it was trained with, with --config"
        )
    return file


def _described(source: Path, file: Path) -> tuple[Plan, Description, list[str]]:
    """A MindSpore checkpoint, the description of its model in ``file``, and lines for the summary."""
    generation, lines = read_json(file.parent / GENERATION), list[str]()
    content: Config = {}
    if file.suffix in (".yaml", ".yml"):
        fields, lines = _fields_of_yaml(file, source)
        described = describe_fields(fields, None, fields.tie_word_embeddings)
        sizes = described.sizes
    else:
        content = read_json(file) or {}
        with naming(file):
            sizes = TelechatSizes.from_hf_config(content)
    plan = plan_mindspore(source, sizes)
    if content:
        with naming(file):
            llama = is_llama(content)
            described = (
                describe_llama(content, generation)
                if llama
                else describe_telechat(content, generation, plan.sizes)
            )
    if plan.sizes.num_experts:
        raise UsageError(
            f"{source} holds a mixture of {plan.sizes.num_experts} experts, which is no Llama, and no common "
            "Hugging Face model has biases in its experts; only dense models can be exported"
        )
    return plan, replace(described, sizes=plan.sizes), lines


def _fields_of_yaml(file: Path, source: Path) -> tuple[ModelSettings, list[str]]:
    """The fields of a YAML, completed by a config.json of ``source``, and lines on what came from there."""
    settings = read_settings(str(file.absolute()), {}, Path.cwd())[1]
    lines = settle_model(settings, said_of(settings, source), str(file)) if config_beside(source) else []
    return model_config(settings, with_defaults(settings, "parallel_config")), lines


def _exported_config(file: Path, description: Description, dtype: str) -> bytes:
    """config.json of an export: a Llama's own, changed where the weights ask for it, or a new one."""
    content = llama_config(description, dtype)
    own = (read_json(file) if file.suffix == ".json" else None) or {}
    if not own or not is_llama(own):
        return json_bytes(content)
    flags = {
        key: content[key] for key in ("attention_bias", "mlp_bias") if content[key] != bool(own.get(key))
    }
    dtypes = {key: dtype for key in ("torch_dtype", "dtype") if own.get(key) not in (None, dtype)}
    if flags and is_mistral(own):  # whose class in transformers has no biases
        flags |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        flags |= {"attention_bias": description.attention_bias, "mlp_bias": description.mlp_bias}
    return json_bytes(own | flags | dtypes) if flags or dtypes else file.read_bytes()


def _notes(description: Description, plan: Plan, ignored: Mapping[str, int]) -> list[str]:
    kind = {"llama": "Llama", "telechat": "TeleChat", "telechat v1": "TeleChat v1"}[description.origin]
    model, left_out = model_notes(plan, f"{kind}, ", ignored)
    method = description.extension[0]
    rotary = f"rotary base {description.theta:.8g}, up to {description.seq_length:,} tokens"
    return [model, rotary + ("" if method == "None" else f", {method}"), left_out]


def _export_notes(weights: Weights, description: Description) -> list[str]:
    made_up = sum(name.endswith((*ATTENTION_ZEROS, *MLP_ZEROS)) for _, name in weights)
    notes = [f"written as LlamaForCausalLM, with {made_up} all-zero biases that TeleChat lacks"]
    if description.grows:
        notes.append(
            f"the same numbers up to {description.seq_length:,} tokens; beyond that TeleChat's own code "
            "stretches the rotary base, which no Llama does"
        )
    return notes
