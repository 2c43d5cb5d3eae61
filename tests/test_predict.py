"""Prediction: a random model in a predict YAML answers as the oracle does; what does not fit is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml
from model_fixtures import RandomModel
from oracle import write_hf_folder

from research.telechat2 import telechat_chat, telechat_predict_utils, telechat_prompt_format
from research.telechat2.checkpoint import convert_to_mindspore, read_mindspore_tensors
from research.telechat2.data.formats import Conversation, parse_line
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_predict_chat import answer_all, chat, question, read_questions
from research.telechat2.telechat_predict_utils import load_predictor, load_weights

CHECKOUT = Path(__file__).resolve().parents[1]
SIZES = {
    "hidden_size": 64, "n_layer": 2, "n_head": 4, "num_key_value_heads": 2, "ffn_hidden_size": 96,
    "vocab_size": 600,
}  # fmt: skip
SEQ_LENGTH, BLOCK_SIZE, NUM_BLOCKS, NEW_TOKENS = 256, 16, 64, 12
END = 2


@pytest.fixture(scope="module")
def random(tmp_path_factory) -> RandomModel:
    return RandomModel(tmp_path_factory.mktemp("random"), seed=5, **SIZES)


def write_yaml(path: Path, model_config: dict | None = None, **sections) -> Path:
    """A predict YAML of SIZES over the shipped base, on a CPU."""
    sizes = {
        "seq_length": SEQ_LENGTH, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2,
        "intermediate_size": 96, "vocab_size": 600, "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS,
        "compute_dtype": "float32", "param_init_type": "float32", "rotary_dtype": "float32",
        "res_dtype": "float32",
    }  # fmt: skip
    content = {
        "base_config": str(CHECKOUT / "research" / "telechat2" / "telechat2-base" / "predict.yaml"),
        "model": {"model_config": sizes | (model_config or {})},
        "context": {"device_target": "CPU", "jit_config": {"jit_level": "O0"}},
    }
    path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return write_yaml(tmp_path_factory.mktemp("config") / "predict.yaml")


@pytest.fixture(scope="module")
def predictor(random, small_vocab, config_file) -> telechat_predict_utils.Predictor:
    """The one compiled model of this file."""
    return load_predictor(
        config_file, small_vocab, random.weights, batch_size=4, generation={"max_new_tokens": NEW_TOKENS}
    )


@pytest.fixture
def limits(predictor):
    """Change the predictor's limits for one test: ``limits(max_length=…, max_new_tokens=…)``."""
    before = predictor.max_length, dict(predictor.generation)

    def change(max_length=None, **generation):
        predictor.max_length = max_length or predictor.max_length
        predictor.generation = predictor.generation | generation
        return predictor

    yield change
    predictor.max_length, predictor.generation = before


@pytest.fixture
def ends_with(predictor):
    """Let another token end answers for one test: a random model hardly ever says ``<_end>``."""

    def change(token: int):
        predictor.model.config.eos_token_id = token

    yield change
    predictor.model.config.eos_token_id = END


def asked(text: str) -> Conversation:
    return Conversation([{"role": "user", "content": text}], None, "chat")


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
    with pytest.raises(ValueError, match="lm_head.weight is missing|lm_head.weight is not in the model"):
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


def torch_folder(random, tmp_path):
    return random.hf


def unrelated(random, tmp_path):
    (tmp_path / "notes.txt").write_text("no weights")
    return tmp_path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (other_shapes, r"feed_forward.w1.weight is \[128, 64\], expected \[96, 64\].*Use the YAML of this"),
        (fewer_layers, r"10 tensors differ: model.layers.1.* is missing"),
        (more_layers, r"10 tensors differ: model.layers.2.* is not in the model"),
        (missing, "model.norm_out.weight"),
        (foreign, "lora_a"),
        (truncated, r"short\.safetensors"),
        (torch_folder, "holds torch weights; convert them first with research/telechat2/convert_weight.py"),
        (unrelated, r"holds no \*.safetensors and no \*.ckpt; found notes.txt"),
    ],
)
def test_weights_that_do_not_fit_are_refused(random, tmp_path, make, said):
    model = TelechatForCausalLM(random.config(seq_length=SEQ_LENGTH))
    with pytest.raises(ValueError, match=said):
        load_weights(model, make(random, tmp_path))


# ---------------------------------------------------------------------- greedy answers
def oracle_answer(random, prompt: list[int], count: int, end: int = END) -> list[int]:
    import torch

    tokens = torch.tensor([prompt])
    found = random.oracle.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False,
        eos_token_id=end, pad_token_id=3,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


QUESTIONS = ["生抽与老抽的区别？", "What is the weather in Beijing today?", "x"]


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
        assert "".join(streamed) == answer.text == predictor.tokenizer.decode(ids, skip_special_tokens=True)
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
    expected = telechat_chat.encode(
        telechat_chat.render(messages, add_generation_prompt=True), small_tokenizer
    )[0]
    found = predictor.prompt_ids(Conversation(messages, None, "chat"))
    assert found == expected
    assert found.count(END) == 1 and found[-1] == small_tokenizer.bot_token_id  # the typed <_end> is text


def test_the_prompt_format_is_the_recorded_one(random, small_vocab, config_file, tmp_path):
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(random.weights.read_bytes())
    telechat_prompt_format.write(folder, "plain")
    tuned = load_predictor(config_file, small_vocab, folder)
    start, user, bot = (tuned.tokenizer.special_id(marker) for marker in ("<_start>", "<_user>", "<_bot>"))
    text = tuned.tokenizer.encode_text("生抽")
    assert tuned.prompt_ids(asked("生抽")) == [start, user, *text, bot]
    assert load_predictor(config_file, small_vocab, random.weights).prompt_format == "chat"
    overridden = load_predictor(config_file, small_vocab, folder, prompt_format="chat")
    assert overridden.prompt_ids(asked("生抽"))[0] == tuned.tokenizer.system_token_id
    with pytest.raises(ValueError, match="the plain prompt format has no place for a system prompt"):
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
    with pytest.raises(ValueError, match=r"the prompt has 40 tokens, but prompt and answer .* may have 40"):
        predictor.generate([[4] * 40])
    with pytest.raises(ValueError, match="question 2 of 2: the prompt has .* tokens"):
        answer_all(predictor, [brief("hi"), brief("hello " * 40)], 1)
    limits(max_length=SEQ_LENGTH, max_new_tokens=500)
    predictor.check([[4]] * 4)  # 4 * 256 tokens are 64 blocks of 16
    with pytest.raises(
        ValueError, match="5 prompts at once, .* may need 80 blocks of the cache, which has 64"
    ):
        predictor.generate([[4]] * 5)


def test_what_does_not_fit_the_yaml_is_refused(random, small_vocab, config_file, tmp_path):
    (tmp_path / "not.model").write_text("this is no SentencePiece model")
    with pytest.raises(ValueError, match=r"not\.model"):
        load_predictor(config_file, tmp_path / "not.model", random.weights)
    with pytest.raises(ValueError, match="max_length is 257, but the YAML's seq_length is 256"):
        load_predictor(config_file, small_vocab, random.weights, max_length=SEQ_LENGTH + 1)
    for name, found in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 3)):
        other = write_yaml(tmp_path / "other.yaml", {name: 9})
        with pytest.raises(
            ValueError, match=f"the YAML's {name} is 9, but in .*tokenizer.model it is {found}"
        ):
            load_predictor(other, small_vocab, random.weights)


def test_the_length_of_an_answer_is_the_yamls_unless_given(random, small_vocab, tmp_path):
    """As run_mindformer.py has it: max_decode_length is that of prompt and answer together."""
    file = write_yaml(tmp_path / "p.yaml", {"max_decode_length": 40})
    predictor = load_predictor(file, small_vocab, random.weights)
    prompt = [4, *range(20, 50)]
    (answer,) = predictor.generate([prompt])
    assert answer.ids == oracle_answer(random, prompt, 40 - len(prompt))
    assert "9 tokens, cut off there by the YAML's max_decode_length" in str(answer)
    with pytest.raises(ValueError, match=r"has 40 tokens, .* may have 40 \(the YAML's max_decode_length\)"):
        predictor.generate([[4] * 40])

    def limit(**given):
        given["generation"] = {"max_new_tokens": given.pop("max_new_tokens", None)}
        found = load_predictor(file, small_vocab, random.weights, **given)
        return found.max_length, found.limited_by, found.generation.get("max_new_tokens")

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
    assert drawn[0] == drawn[1] != drawn[2]
    assert told["device_id"] == 3 and told["jit_config"] == {"jit_level": "O2", "infer_boost": "off"}
    load_predictor(file, small_vocab, random.weights, device_id=1)
    assert told["device_id"] == 1
    file = write_yaml(
        tmp_path / "p.yaml", context={"device_target": "CPU", "jit_config": {"jit_level": "O1"}}
    )
    with pytest.raises(ValueError, match="jit_level is O1, which prediction does not support"):
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
    telechat_prompt_format.write(tmp_path, "plain")
    assert f"prompt format: plain (recorded in {tmp_path / 'prompt_format.json'})" in said(tmp_path)


# ---------------------------------------------------------------------- questions and conversations
def test_questions_of_a_text_file(tmp_path):
    file = tmp_path / "q.txt"
    file.write_bytes("\ufeff第一？\r\n\n  indented\n<_end>".encode())
    found = read_questions(file, system="S")
    assert [q.messages[1:] for q in found] == [
        [{"role": "user", "content": text}] for text in ("第一？", "  indented", "<_end>")
    ]
    assert all(q.messages[0] == {"role": "system", "content": "S"} for q in found)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="q.txt holds no question"):
        read_questions(file)


def test_questions_of_a_jsonl_file(tmp_path, predictor):
    """The last answer is cut off; system, tools and pre-rendered tool tags stay as in training."""
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "own"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    lines = [
        {"messages": [system, user, answer, user, answer]},
        {"input": "<_user>q<_bot>a<_user>q2", "output": "a2"},
        {"messages": [user, answer, user]},
        {"messages": [user]},
        {"messages": [user, answer], "tools": [tool]},
        {"system": "own\n", "dialog": [user, {"role": "bot", "content": "<tool_call>x</tool_call>"}]},
    ]  # fmt: skip
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    found = read_questions(file, system="given")
    given = {"role": "system", "content": "given"}
    assert [q.messages for q in found[:5]] == [
        [system, user, answer, user],
        [given, user, answer, {"role": "user", "content": "q2"}],
        [given, user, answer, user],
        [given, user],
        [given, user],
    ]
    for waiting, line in zip(found, lines, strict=True):
        prompt = predictor.prompt_ids(waiting)
        again = parse_line(json.dumps(line))
        if again.messages[0]["role"] != "system":
            again = again._replace(messages=[given, *again.messages])
        if line not in lines[2:4]:  # their last turn waits for an answer
            trained = telechat_chat.encode(again.render("chat"), predictor.tokenizer)[0]
            assert trained[: len(prompt)] == prompt and predictor.tokenizer.bot_token_id == prompt[-1]
    file.write_text('{"messages": [}\n')
    with pytest.raises(ValueError, match=r"q.jsonl, line 1: not JSON"):
        read_questions(file)


def test_answers_are_printed_with_their_questions(limits, capsys):
    predictor = limits(max_new_tokens=4)
    answer_all(predictor, [asked(text) for text in QUESTIONS], batch_size=2)
    said = capsys.readouterr()
    singles = [predictor.ask(asked(text).messages).text for text in QUESTIONS]
    assert said.out == "".join(f"{q}\n{a}\n\n" for q, a in zip(QUESTIONS, singles, strict=True))
    assert said.err.count("cut off") == 3 and "[2 answers, 8 tokens" in said.err


class Scripted:
    """A predictor that counts characters and always says the same."""

    def __init__(self, max_length: int):
        self.max_length, self.prompt_format, self.heard = max_length, "chat", []

    def prompt_ids(self, conversation):
        return [ord(c) for message in conversation.messages for c in message["content"]]

    def fits(self, prompt):
        return len(prompt) < self.max_length

    def check(self, prompts):
        if not self.fits(prompts[0]):
            raise ValueError(f"the prompt has {len(prompts[0])} tokens")

    def ask(self, messages, on_text):
        prompt = self.prompt_ids(Conversation(messages, None, "chat"))
        self.check([prompt])
        self.heard.append("".join(map(chr, prompt)))
        on_text("AA")
        return telechat_predict_utils.Answer("AA", [1, 2], "", 1.0, 0.5)


def test_a_conversation_that_outgrows_the_model_forgets_its_oldest_turns(capsys):
    predictor = Scripted(max_length=9)
    chat(predictor, "S", ["b\n", "\n", "c", "d", " /new \n", "e"])
    # system message, then turns of one character and answers of two: a third question is too much
    assert predictor.heard == ["Sb", "SbAAc", "SbAAcAAd"[:8]] + ["Se"]
    said = capsys.readouterr()
    assert said.out == "AA\n" * 4
    predictor = Scripted(max_length=8)
    chat(predictor, "S", ["b", "c", "d", "e"])
    assert predictor.heard == ["Sb", "SbAAc", "ScAAd", "SdAAe"]
    assert capsys.readouterr().err.count("its oldest 2 messages are forgotten") == 2


def test_a_line_that_is_too_long_leaves_the_conversation_as_it_was(capsys):
    predictor = Scripted(max_length=9)
    assert chat(predictor, "S", ["b", "123456789", "c"]) == 1
    assert predictor.heard == ["Sb", "SbAAc"]
    said = capsys.readouterr()
    assert "(not asked: the prompt has 10 tokens)" in said.err and "forgotten" not in said.err
    assert said.out == "AA\nAA\n"


# ---------------------------------------------------------------------- the commands
def predict(*words, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(CHECKOUT / "research" / "telechat2" / "run_telechat_predict.py"),
        *map(str, words),
    ]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300)


def test_the_command_answers_and_keeps_a_conversation(random, small_vocab, config_file, predictor, tmp_path):
    words = [
        "--yaml_file",
        config_file,
        "--vocab_file_path",
        small_vocab,
        "--checkpoint_path",
        random.weights,
    ]
    words += ["--max_new_tokens", 6, "--do_sample", "False"]
    told = predict(*words, cwd=tmp_path, stdin=f"{QUESTIONS[0]}\n/new\n{QUESTIONS[1]}\n")
    assert told.returncode == 0, told.stderr
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS[:2]]
    texts = [
        predictor.tokenizer.decode(oracle_answer(random, prompt, 6), skip_special_tokens=True)
        for prompt in prompts
    ]
    assert told.stdout == "".join(f"{text}\n" for text in texts)
    assert not any(tmp_path.iterdir())
    config, chosen, *figures = told.stderr.splitlines()  # and no warning, no note of the libraries
    assert config == f"config: {config_file}" and chosen.startswith("prompt format: chat (none is recorded")
    assert len(figures) == 2 and all(line.startswith("[6 tokens, cut off there by --max") for line in figures)


def test_the_command_shows_the_plugins_own_warnings_and_goes_on_after_a_long_line(
    random, small_vocab, predictor, tmp_path
):
    """The second of three questions is too long: exit code 1, since standard input is no person."""
    room = len(predictor.prompt_ids(asked("x"))) + 10
    write_yaml(tmp_path / "p.yaml", {"num_blocks": 15, "max_decode_length": room})
    words = ["--yaml_file", "p.yaml", "--vocab_file_path", small_vocab, "--checkpoint_path", random.weights]
    words += ["--auto_trans_ckpt", "False", "--use_parallel", "False"]
    told = predict(*words, cwd=tmp_path, stdin=f"x\n{'word ' * 60}\ny\n")
    assert told.stdout.count("\n") >= 2 and told.returncode == 1
    said = told.stderr.splitlines()
    assert any(line.startswith("WARNING: The paged cache holds 240 tokens, fewer than") for line in said)
    assert sum("(not asked: the prompt has" in line for line in said) == 1
    assert said[-1] == "error: 1 lines of standard input were not asked; see above."


def test_mistakes_end_in_one_sentence(random, small_vocab, config_file, tmp_path):
    """Through the real command: exit code 1, nothing on stdout, one line on stderr, no litter."""
    vocab, weights = ["--vocab_file_path", small_vocab], ["--checkpoint_path", random.weights]
    typo = write_yaml(tmp_path / "typo.yaml", {"num_layer": 2})
    small = write_yaml(tmp_path / "small.yaml", {"vocab_size": 500})
    ascend = write_yaml(tmp_path / "ascend.yaml", context={"device_target": "Ascend"})
    (tmp_path / "empty.yaml").write_text("run_mode: predict\n")
    cases = [
        (["--yaml_file", config_file, *weights], "names no vocab_file; give --vocab_file_path"),
        (["--yaml_file", config_file, *vocab], "names no load_checkpoint; give --checkpoint_path"),
        (
            ["--yaml_file", config_file, *vocab, "--checkpoint_path", "no"],
            "--checkpoint_path no does not exist",
        ),
        (["--yaml_file", config_file, *weights, "--vocab_file_path", "no"], "--vocab_file_path no does not"),
        (["--yaml_file", "predict_telechat_tyni.yaml"], "predict_telechat_tiny.yaml"),
        (["--yaml_file", "empty.yaml"], "has no section model.model_config"),
        (["--yaml_file", config_file, "--use_parallel", "True"], "predicts on one device"),
        (["--yaml_file", config_file, "--auto_trans_ckpt", "True"], "--auto_trans_ckpt True: .* one device"),
        (["--yaml_file", config_file, "--src_strategy_path_or_dir", "s"], "_or_dir s: .* one device"),
        (["--yaml_file", config_file, "--batch_size", "0"], "--batch_size is 0"),
        (["--yaml_file", typo, *vocab, *weights], "'num_layer'.* did you mean 'num_layers'"),
        (["--yaml_file", small, *vocab, *weights], "tokens, but the YAML's vocab_size is 500"),
        (["--yaml_file", ascend, *vocab, *weights], "Ascend"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, said in cases:
        told = predict(*words, "hi", cwd=tmp_path)
        assert (told.returncode, told.stdout) == (1, ""), (words, told.stderr)
        *config, error = told.stderr.splitlines()
        assert error.startswith("error: ") and re.search(said, error), (words, told.stderr)
        assert [line.split(": ")[0] for line in config] in ([], ["config"]), (words, told.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def run_mindformer(*words, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(CHECKOUT / "run_mindformer.py"), "--run_mode", "predict", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_run_mindformer_answers_a_raw_prompt_with_the_same_ids(random, small_vocab, predictor, tmp_path):
    raw = "<_start><_user>生抽与老抽的区别？<_bot>"
    prompt = telechat_chat.raw_prompt(raw, predictor.tokenizer)
    (answer,) = predictor.generate([prompt])
    file = write_yaml(tmp_path / "predict.yaml", {"max_decode_length": len(prompt) + NEW_TOKENS})
    words = ["--config", file, "--load_checkpoint", random.weights, "--predict_data", raw]
    words += ["--processor.tokenizer.vocab_file", small_vocab, "--output_dir", "out"]
    told = run_mindformer(*words, cwd=tmp_path)
    assert told.returncode == 0, told.stderr[-3000:]
    whole = predictor.tokenizer.decode([*prompt, *answer.ids], skip_special_tokens=True)
    assert told.stdout.endswith(f"{whole}\n") and answer.text and whole.endswith(answer.text)


def test_run_mindformer_samples_on_a_cpu_as_the_seed_says(random, small_vocab, predictor, tmp_path):
    """The same seed gives the same answer, and it is not the likeliest one."""
    raw = "<_start><_user>生抽与老抽的区别？<_bot>"
    prompt = telechat_chat.raw_prompt(raw, predictor.tokenizer)
    greedy = predictor.tokenizer.decode(oracle_answer(random, prompt, 16), skip_special_tokens=True)
    file = write_yaml(tmp_path / "p.yaml", {"max_decode_length": len(prompt) + 16, "top_k": 300})
    words = ["--config", file, "--load_checkpoint", random.weights, "--predict_data", raw, "--seed", 1]
    words += ["--do_sample", "True", "--processor.tokenizer.vocab_file", small_vocab]
    found = []
    for output in ("first", "second"):
        told = run_mindformer(*words, "--output_dir", output, cwd=tmp_path)
        assert told.returncode == 0, told.stderr[-3000:]
        found.append(told.stdout.rsplit("生抽与老抽的区别？", 1)[1].rstrip("\n"))
    assert found[0] == found[1] != greedy


def test_run_mindformer_pads_by_the_tokenizer_where_the_model_has_no_padding(
    random, small_vocab, predictor, tmp_path
):
    raw = ["<_start><_user>生抽与老抽的区别？<_bot>", "<_start><_user>x<_bot>"]
    prompts = [telechat_chat.raw_prompt(text, predictor.tokenizer) for text in raw]
    longest = max(map(len, prompts))
    file = write_yaml(tmp_path / "p.yaml", {"pad_token_id": -1, "max_decode_length": longest + 4})
    (tmp_path / "prompts.txt").write_text("\n".join(raw), encoding="utf-8")
    words = ["--config", file, "--load_checkpoint", random.weights, "--predict_data", "prompts.txt"]
    words += ["--processor.tokenizer.vocab_file", small_vocab, "--predict_batch_size", 2, "--output_dir", "o"]
    told = run_mindformer(*words, cwd=tmp_path)
    assert told.returncode == 0, told.stderr[-3000:]
    for prompt in prompts:
        whole = [*prompt, *oracle_answer(random, prompt, longest + 4 - len(prompt))]
        assert predictor.tokenizer.decode(whole, skip_special_tokens=True) in told.stdout


def test_run_mindformer_refuses_prompts_that_cannot_be_answered(random, small_vocab, tmp_path):
    file = write_yaml(tmp_path / "p.yaml", {"max_decode_length": 40})
    words = [
        "--config",
        file,
        "--load_checkpoint",
        random.weights,
        "--predict_data",
        "<_user>" + "word " * 60,
    ]
    told = run_mindformer(*words, "--processor.tokenizer.vocab_file", small_vocab, cwd=tmp_path)
    assert told.returncode == 1 and "Traceback" not in told.stderr
    said = (
        r"^error: prompt 1 of 1: the prompt has \d+ tokens, .* may have 40 \(the YAML's max_decode_length\)"
    )
    assert re.search(said, told.stderr, re.MULTILINE), told.stderr[-2000:]


def test_prompts_of_run_mindformer_are_read_and_checked(small_vocab, tmp_path):
    from research.telechat2.telechat_compat import MindFormerConfig
    from research.telechat2.telechat_run_predict import prepare_prompts

    def prepare(*words, **model_config):
        tokenizer = {"type": "TelechatTokenizer", "vocab_file": str(small_vocab)}
        model = {"model_config": {"vocab_size": 600, "seq_length": 30} | model_config}
        config = MindFormerConfig(input_data=list(words), processor={"tokenizer": tokenizer}, model=model)
        return prepare_prompts(config), config.model.model_config.pad_token_id

    file = tmp_path / "prompts.txt"
    file.write_text("<_user>第一\\n？<_bot>\r\n<_user>b<_bot>", encoding="utf-8")
    assert prepare(str(file), pad_token_id=-1) == (["<_user>第一\n？<_bot>", "<_user>b<_bot>"], 3)
    assert prepare("<_user>b<_bot>", pad_token_id=3) == ("<_user>b<_bot>", 3)
    assert prepare("a", "b", pad_token_id=3) == (["a", "b"], 3)
    file.write_text("<_user>a<_bot>\n\n<_user>b<_bot>\n")
    with pytest.raises(ValueError, match="prompt 2 of 3: it is empty"):
        prepare(str(file))
    # a token for each byte, as no piece holds it, after SentencePiece's space before the text
    assert prepare("\x01" * 28, max_decode_length=512, pad_token_id=3)[1] == 3
    with pytest.raises(ValueError, match=r"prompt 2 of 2: .* has 30 tokens, .* 30 \(the YAML's seq_length\)"):
        prepare("a", "\x01" * 29)
    with pytest.raises(ValueError, match="the YAML's eos_token_id is 5, but in .*tokenizer.model it is 2"):
        prepare("a", eos_token_id=5)


def test_run_mindformer_asks_for_a_vocabulary_at_once(config_file, tmp_path):
    """The base YAML's vocab_file is empty."""
    words = ["--config", config_file, "--predict_data", "<_user>x<_bot>"]
    for more, said in (
        (
            [],
            "error: the config names no vocab_file; give --processor.tokenizer.vocab_file tokenizer.model.\n",
        ),
        (
            ["--processor.tokenizer.vocab_file", "no"],
            "error: processor.tokenizer.vocab_file is no, but there is",
        ),
    ):
        told = run_mindformer(*words, *more, cwd=tmp_path)
        assert told.returncode == 1 and told.stderr.startswith(said), told.stderr
        assert "mindformers" not in told.stdout and not any(tmp_path.iterdir())
