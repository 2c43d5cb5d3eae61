"""Prediction: a random model in a predict YAML answers as the oracle does; what does not fit is refused."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from model_fixtures import RandomModel
from oracle import write_hf_folder
from predict_model import (
    CHECKOUT,
    END,
    NEW_TOKENS,
    QUESTIONS,
    SEQ_LENGTH,
    SIZES,
    asked,
    oracle_answer,
    write_yaml,
)
from refusal import refused

from research.telechat2.checkpoint.convert import convert_to_mindspore, read_mindspore_tensors
from research.telechat2.data.conversions import Conversation
from research.telechat2.infer.chat import answer_all, question
from research.telechat2.infer.loading import load_predictor, load_weights
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.text import chat, prompt_format


# ---------------------------------------------------------------------- weights
def test_every_parameter_is_the_files(predictor, random):
    stored = dict(read_mindspore_tensors(random.weights))
    found = {name: p.asnumpy() for name, p in predictor.model.parameters_and_names() if "_cache" not in name}
    assert found.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_tied_model_loads_its_one_matrix(tmp_path, random):
    tied = RandomModel(tmp_path, seed=6, tied=True, **SIZES)
    model = TelechatForCausalLM(tied.config(seq_length=SEQ_LENGTH))
    load_weights(model, tied.weights)
    stored = dict(read_mindspore_tensors(tied.weights))["model.tok_embeddings.embedding_weight"]
    np.testing.assert_array_equal(model.lm_head.weight.asnumpy(), stored)
    with refused("lm_head.weight"):
        load_weights(model, random.weights)


def test_weights_are_cast_to_the_types_of_the_yaml(tmp_path):
    """A bfloat16 release into a float32 model: bfloat16 is the upper half of float32."""
    write_hf_folder(tmp_path / "torch", SIZES, seed=7, dtype="bfloat16")
    convert_to_mindspore(tmp_path / "torch", tmp_path / "ms")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "ms" / "model.safetensors")
    random = RandomModel(tmp_path / "fp32", seed=7, **SIZES)
    model = TelechatForCausalLM(random.config(seq_length=SEQ_LENGTH))
    load_weights(model, tmp_path / "ms")
    for name, parameter in model.parameters_and_names():
        assert parameter.dtype == ms.float32
        np.testing.assert_array_equal(parameter.asnumpy(), stored[name].float().numpy(), err_msg=name)


def test_a_hugging_face_folder_loads_without_a_conversion(random, tmp_path):
    """As downloaded, in bfloat16 shards: the same parameters as of the converted checkpoint."""
    write_hf_folder(tmp_path / "torch", SIZES, seed=7, dtype="bfloat16", shards=3)
    convert_to_mindspore(tmp_path / "torch", tmp_path / "ms")
    model = TelechatForCausalLM(random.config(seq_length=SEQ_LENGTH))
    load_weights(model, tmp_path / "torch")
    found = {name: parameter.asnumpy() for name, parameter in model.parameters_and_names()}
    converted = dict(read_mindspore_tensors(tmp_path / "ms"))
    assert found.keys() == converted.keys()
    for name, array in converted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def rewrite(source: Path, target: Path, **changes) -> Path:
    """A checkpoint with tensors left out (None), replaced or added."""
    from safetensors.numpy import load_file, save_file

    tensors = {name: array for name, array in load_file(source).items() if name not in changes}
    save_file(tensors | {name: array for name, array in changes.items() if array is not None}, target)
    return target


def other_shapes(random, tmp_path):
    """A whole TeleChat model, but of another width."""
    other = RandomModel(tmp_path / "other", seed=0, **(SIZES | {"ffn_hidden_size": 128}))
    return other.weights


def fewer_layers(random, tmp_path):
    return RandomModel(tmp_path / "other", seed=0, **(SIZES | {"n_layer": 1})).weights


def more_layers(random, tmp_path):
    return RandomModel(tmp_path / "other", seed=0, **(SIZES | {"n_layer": 3})).weights


def missing(random, tmp_path):
    return rewrite(random.weights, tmp_path / "x.safetensors", **{"model.norm_out.weight": None})


def foreign(random, tmp_path):
    extra = {"model.layers.0.attention.wo.lora_a": np.zeros((4, 64), np.float32)}
    return rewrite(random.weights, tmp_path / "x.safetensors", **extra)


def truncated(random, tmp_path):
    (tmp_path / "short.safetensors").write_bytes(random.weights.read_bytes()[:-100])
    return tmp_path / "short.safetensors"


def other_heads(random, tmp_path):
    """Of the same shapes: only its config.json tells that its rows make other heads."""
    write_hf_folder(tmp_path / "hf", SIZES | {"n_head": 8, "num_key_value_heads": 4}, seed=1)
    return tmp_path / "hf"


def unrelated(random, tmp_path):
    (tmp_path / "notes.txt").write_text("no weights")
    return tmp_path


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (other_shapes, ("feed_forward.w1.weight", [128, 64], [96, 64])),
        (fewer_layers, ("10 tensors", "model.layers.1.")),
        (more_layers, ("10 tensors", "model.layers.2.")),
        (missing, ["model.norm_out.weight"]),
        (foreign, ["lora_a"]),
        (truncated, ["short.safetensors"]),
        (other_heads, ("8 heads", "4 key/value heads", "4 and 2")),
        (unrelated, ("*.safetensors", "*.ckpt", "notes.txt")),
    ],
)
def test_weights_that_do_not_fit_are_refused(random, tmp_path, make, named):
    model = TelechatForCausalLM(random.config(seq_length=SEQ_LENGTH))
    with refused(*named):
        load_weights(model, make(random, tmp_path))


def test_answers_equal_the_oracles_token_by_token(predictor, random):
    """Asked alone and in one batch of unequal lengths; text and streamed text are those of the ids."""
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) > 1
    expected = [oracle_answer(random, prompt, NEW_TOKENS) for prompt in prompts]
    assert [answer.ids for answer in predictor.generate(prompts)] == expected
    for text, ids in zip(QUESTIONS, expected, strict=True):
        streamed = []
        answer = predictor.ask(asked(text).messages, on_text=streamed.append)
        assert answer.ids == ids and len(ids) == NEW_TOKENS  # the last token of an answer cut off stays
        exact = predictor.tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(streamed) == answer.text == exact.rstrip("\ufffd")  # ends before a cut character
        assert answer.cut and "12 tokens, cut off there" in str(answer)
        assert 0 <= answer.seconds_to_first_token <= answer.seconds


def test_an_answer_ends_with_its_end_token(predictor, random, ends_with):
    """One row of a batch ends, the other runs on; the text has no trace of the end."""
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS[:2]]
    end = oracle_answer(random, prompts[0], 5)[4]
    expected = [oracle_answer(random, prompt, NEW_TOKENS, end) for prompt in prompts]
    assert len(expected[0]) <= 5 < len(expected[1])
    ends_with(end)
    first, second = predictor.generate(prompts)
    assert [first.ids, second.ids] == expected
    assert first.ids[-1] == end and not first.cut and "cut" not in str(first) and second.cut


def test_limits_of_length(limits, random):
    """In a batch each row has its own room: a long prompt takes nothing from a short one's answer."""
    predictor = limits(max_new_tokens=9)
    short, long = ([*prompt, 5] for prompt in ([4, 20, 21], [4, *range(20, 60)]))
    limits(max_length=len(long) + 2)
    answers = predictor.generate([short, long])
    assert [answer.ids for answer in answers] == [
        oracle_answer(random, short, 9),
        oracle_answer(random, long, 2),
    ]
    assert [answer.ids for answer in predictor.generate([long])] == [oracle_answer(random, long, 2)]
    limits(max_new_tokens=1)
    assert [len(answer.ids) for answer in predictor.generate([short, long])] == [1, 1]


def test_the_last_token_the_model_can_hold(limits, random):
    predictor = limits(max_new_tokens=9)
    prompt = np.random.default_rng(0).integers(20, 600, SEQ_LENGTH - 1).tolist()
    (answer,) = predictor.generate([prompt])
    assert answer.ids == oracle_answer(random, prompt, 1) and answer.cut


def test_sampling_only_when_asked(predictor, limits, random):
    """Greedy answers equal argmax whatever the seed; sampling among many tokens does not."""
    prompt = predictor.prompt_ids(asked(QUESTIONS[0]))
    greedy = oracle_answer(random, prompt, NEW_TOKENS)

    def answers(**generation):
        limits(**generation)
        found = []
        for seed in (1, 2):
            np.random.seed(seed)
            found.append(predictor.generate([prompt])[0].ids)
        return found

    assert answers(do_sample=False) == [greedy, greedy]
    assert answers(do_sample=True, top_k=1) == [greedy, greedy]
    first, second = answers(do_sample=True, top_k=0, temperature=2.0)
    assert first != second and greedy not in (first, second)


def test_repetition_penalty_changes_what_is_repeated(predictor, limits, random):
    prompt = predictor.prompt_ids(asked(QUESTIONS[0]))
    limits(repetition_penalty=50.0)
    (answer,) = predictor.generate([prompt])
    assert len(set(answer.ids)) == len(answer.ids) and not set(answer.ids) & set(prompt)


# ---------------------------------------------------------------------- prompts
def test_the_prompt_is_the_renderers(predictor, small_tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "literal <_end> here"},
        {"role": "assistant", "content": "ok\n"},
        {"role": "user", "content": "次"},
    ]
    expected = chat.encode(chat.render(messages, add_generation_prompt=True), small_tokenizer.vocabulary)[0]
    found = predictor.prompt_ids(Conversation(messages, None, "chat"))
    assert found == expected
    assert found.count(END) == 1  # the typed <_end> is text
    assert found[-1] == small_tokenizer.vocabulary.special_ids.get("<_bot>")


def test_the_prompt_format_is_the_recorded_one(random, small_vocab, config_file, tmp_path):
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(random.weights.read_bytes())
    prompt_format.write(folder, "plain")
    tuned = load_predictor(config_file, small_vocab, folder)
    start, user, bot = (
        tuned.tokenizer.vocabulary.special_ids.get(marker) for marker in ("<_start>", "<_user>", "<_bot>")
    )
    text = tuned.tokenizer.encode_text("生抽")
    assert tuned.prompt_ids(asked("生抽")) == [start, user, *text, bot]
    assert load_predictor(config_file, small_vocab, random.weights).prompt_format == "chat"
    overridden = load_predictor(config_file, small_vocab, folder, prompt_format="chat")
    assert overridden.prompt_ids(asked("生抽"))[0] == tuned.tokenizer.vocabulary.special_ids.get("<_system>")
    with refused("plain", "system"):
        tuned.prompt_ids(question("x", system="Be brief."))


def test_generation_settings_are_the_yamls_unless_given(random, small_vocab, tmp_path):
    file = write_yaml(tmp_path / "p.yaml", {"do_sample": True, "top_k": 7, "repetition_penalty": 1.5})
    predictor = load_predictor(
        file, small_vocab, random.weights, generation={"top_k": None, "do_sample": False}
    )
    assert predictor.generation == {"do_sample": False}
    config = predictor.model.config
    assert (config.top_k, config.repetition_penalty) == (7, 1.5)  # where generate looks for the rest


def test_prompts_without_room_are_refused(limits):
    def brief(text):
        return question(text, system="S")

    predictor = limits(max_length=40, max_new_tokens=30)
    predictor.check([[4] * 39])
    with refused("40 tokens", predictor.limits.source):
        predictor.generate([[4] * 40])
    with refused("question 2 of 2"):
        answer_all(predictor, [brief("hi"), brief("hello " * 40)], 1)
    limits(max_length=SEQ_LENGTH, max_new_tokens=500)
    predictor.check([[4]] * 4)  # 4 * 256 tokens are 64 blocks of 16
    with refused("5 prompts", "80 blocks", "16 tokens", 64):
        predictor.generate([[4]] * 5)


def test_a_batch_is_checked_as_it_will_be_generated(limits, monkeypatch, capsys):
    """All rows have the room of the shortest prompt, 159 tokens, up to the model's 256: 4 * 16 + 10 blocks.

    Their own rooms would be 5 * 10 blocks of the 64.
    """
    predictor = limits(max_length=160, max_new_tokens=500)
    monkeypatch.setattr(predictor, "prompt_ids", lambda asked: [4] * int(asked.messages[-1]["content"]))
    asked = [question(size) for size in ["1", "1", "1", "1", "1", "150", "150", "150", "150", "1"]]
    named = ("5 prompts", "74 blocks", "16 tokens", 64)
    with refused(*named):
        answer_all(predictor, asked, 5)
    assert capsys.readouterr().out == ""  # not stopped midway
    monkeypatch.setattr(predictor, "check", lambda prompts: None)
    with refused(*named):
        predictor.generate([[4] * 150] * 4 + [[4]])


def test_what_does_not_fit_the_yaml_is_refused(random, small_vocab, config_file, tmp_path):
    (tmp_path / "not.model").write_text("this is no SentencePiece model")
    with refused("not.model"):
        load_predictor(config_file, tmp_path / "not.model", random.weights)
    with refused(257, "seq_length", 256):
        load_predictor(config_file, small_vocab, random.weights, max_length=SEQ_LENGTH + 1)
    alone = tmp_path / "alone.safetensors"  # without the config.json of its release
    alone.write_bytes(random.weights.read_bytes())
    for name, found in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 3)):
        other = write_yaml(tmp_path / "other.yaml", {name: 9})
        with refused(name, 9, "tokenizer.model", found):
            load_predictor(other, small_vocab, alone)
        if name != "pad_token_id":
            with refused(f"{name}: 9", f"{name} in ms.safetensors.config.json: {found}"):
                load_predictor(other, small_vocab, random.weights)


def test_the_length_of_an_answer_is_the_yamls_unless_given(random, small_vocab, tmp_path):
    """As run_mindformer.py has it: max_decode_length is that of prompt and answer together."""
    file = write_yaml(tmp_path / "p.yaml", {"max_decode_length": 40})
    predictor = load_predictor(file, small_vocab, random.weights)
    prompt = [4, *range(20, 50)]
    (answer,) = predictor.generate([prompt])
    assert answer.ids == oracle_answer(random, prompt, 40 - len(prompt))
    assert "9 tokens, cut off there by the YAML's max_decode_length" in str(answer)
    with refused("40 tokens", "max_decode_length"):
        predictor.generate([[4] * 40])

    def limit(**given):
        given["generation"] = {"max_new_tokens": given.pop("max_new_tokens", None)}
        found = load_predictor(file, small_vocab, random.weights, **given)
        return found.limits.max_length, found.limits.source, found.limits.max_new_tokens

    assert limit(max_new_tokens=7) == (SEQ_LENGTH, "the YAML's seq_length", 7)
    assert limit(max_length=50) == (50, "--max_length", None)
    assert limit(max_length=50, max_new_tokens=7) == (50, "--max_length", 7)


def test_a_model_without_padding_answers_batches_as_singles(random, small_vocab, tmp_path):
    file = write_yaml(tmp_path / "p.yaml", {"pad_token_id": -1})
    predictor = load_predictor(
        file, small_vocab, random.weights, batch_size=3, generation={"max_new_tokens": 5}
    )
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS]
    found = [answer.ids for answer in predictor.generate(prompts)]
    assert found == [oracle_answer(random, prompt, 5) for prompt in prompts]


def test_seed_and_device_are_the_yamls(random, small_vocab, tmp_path, monkeypatch):
    """Loading seeds the random numbers; the device and the compiler's level reach MindSpore."""
    told = {}
    monkeypatch.setattr(ms, "set_context", lambda **settings: told.update(settings))
    context = {"device_target": "CPU", "device_id": 3, "jit_level": "O2", "infer_boost": "off"}
    content = {"base_config": str(CHECKOUT / "research/telechat2/telechat2-base/predict.yaml")}
    drawn = []
    for seed in (5, 5, 6):
        file = write_yaml(tmp_path / "p.yaml", context=context, seed=seed, **content)
        load_predictor(file, small_vocab, random.weights)
        drawn.append(np.random.rand())
    for seed in (9, 9):
        load_predictor(file, small_vocab, random.weights, seed=seed)  # wins over the YAML's
        drawn.append(np.random.rand())
    assert drawn[0] == drawn[1] != drawn[2] != drawn[3] == drawn[4] != drawn[0]
    assert told["device_id"] == 3 and told["jit_config"] == {"jit_level": "O2", "infer_boost": "off"}
    load_predictor(file, small_vocab, random.weights, device_id=1)
    assert told["device_id"] == 1
    file = write_yaml(
        tmp_path / "p.yaml", context={"device_target": "CPU", "jit_config": {"jit_level": "O1"}}
    )
    with refused("jit_level", "O1", "O0"):
        load_predictor(file, small_vocab, random.weights)


def test_the_prompt_format_and_where_it_comes_from_are_said(
    random, small_vocab, config_file, tmp_path, capsys
):
    def said(checkpoint, **given):
        load_predictor(config_file, small_vocab, checkpoint, **given)
        return capsys.readouterr().err

    assert "prompt format: chat (none is recorded with" in said(random.weights)
    assert "prompt format: plain (as asked for)" in said(random.weights, prompt_format="plain")
    (tmp_path / "model.safetensors").write_bytes(random.weights.read_bytes())
    prompt_format.write(tmp_path, "plain")
    assert f"prompt format: plain (recorded in {tmp_path / 'prompt_format.json'})" in said(tmp_path)
