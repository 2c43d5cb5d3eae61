"""What the tests of relatives share: random Llama folders, v1's spelling, and our model from its YAML."""

import json
from pathlib import Path

import yaml
from oracle import write_hf_folder


def v1_folder(folder: Path, sizes: dict, seed: int, tied: bool, prefix: bool) -> dict:
    """A folder as TeleChat v1 stores it: no base_seqlen, and for 7B no prefix and no word on tying.

    Returns its config. ``folder / "as_v2"`` holds the same with the names the oracle reads.
    """
    from safetensors.numpy import load_file, save_file

    write_hf_folder(folder / "as_v2", sizes, seed=seed, tied=tied)
    config = json.loads((folder / "as_v2" / "config.json").read_text())
    config |= {"seq_length": 8192, "training_seqlen": 8192}
    del config["base_seqlen"]
    if tied:
        del config["tie_word_embeddings"]
    tensors = load_file(folder / "as_v2" / "model.safetensors")
    if not prefix:
        tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    (folder / "v1").mkdir()
    save_file(tensors, folder / "v1" / "model.safetensors")
    (folder / "v1" / "config.json").write_text(json.dumps(config))
    return config


def llama_folder(folder: Path, seed: int = 0, biases: float = 0.0, **config) -> None:
    """A random Llama as transformers saves it; of its biases, those that TeleChat has are this large."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.bias", "down_proj.bias")):
                parameter.normal_(std=biases)
            elif name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


def byte_level_tokenizer(folder: Path) -> None:
    """A tokenizer as TeleChat v1 7B has it: byte-level BPE, markers added at the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["生抽与老抽的区别？ the dog"] * 4, trainer)
    tokenizer.add_special_tokens(["<_user>", "<_bot>", "<_start>", "<_end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BloomTokenizerFast", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings |= {"bos_token": "<_start>", "eos_token": "<_end>", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load_exported(folder: Path):
    """A folder as transformers loads it: fp32, eager attention, evaluation mode, nothing made up."""
    import torch
    from transformers import LlamaForCausalLM

    model, report = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def section_of(folder: Path, kind: str = "predict") -> dict:
    """The model_config of a YAML that was written beside weights, completed by their config.json."""
    from research.telechat2.checkpoint.release.stated import said_of
    from research.telechat2.config.release import settle_model

    section = yaml.safe_load((folder / f"{kind}.yaml").read_text())["model"]["model_config"]
    settings = {"model": {"model_config": section}}
    settle_model(settings, said_of(settings, folder), "the YAML")
    return section


def our_model(weights: Path, section: dict, **more):
    """TelechatForCausalLM of a YAML's section in fp32, with converted weights, in evaluation mode."""
    import mindspore as ms

    from research.telechat2.checkpoint.convert import read_mindspore_tensors
    from research.telechat2.telechat import TelechatForCausalLM
    from research.telechat2.telechat_config import TelechatConfig

    fp32 = {"compute_dtype": "float32", "param_init_type": "float32", "res_dtype": "float32"}
    model = TelechatForCausalLM(TelechatConfig(**(section | fp32 | more)))
    arrays = {name: ms.Parameter(ms.Tensor(array)) for name, array in read_mindspore_tensors(weights)}
    missing, foreign = ms.load_param_into_net(model, arrays)
    assert not foreign and all(name.endswith("_cache") for name in missing)
    return model.set_train(False)
