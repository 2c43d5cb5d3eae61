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
from research.telechat2.data.formats import Conversation
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_predict_utils import load_predictor, load_weights, read_questions

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
        tuned.prompt_ids(telechat_predict_utils.question("x", system="Be brief."))


def test_generation_settings_are_the_yamls_unless_given(random, small_vocab, tmp_path):
    file = write_yaml(tmp_path / "p.yaml", {"do_sample": True, "top_k": 7, "repetition_penalty": 1.5})
    predictor = load_predictor(
        file, small_vocab, random.weights, generation={"top_k": None, "do_sample": False}
    )
    assert predictor.generation == {"max_new_tokens": 512, "do_sample": False}
    config = predictor.model.config
    assert (config.top_k, config.repetition_penalty) == (7, 1.5)  # where generate looks for the rest


def test_prompts_without_room_are_refused(limits):
    def brief(text):
        return telechat_predict_utils.question(text, system="S")

    predictor = limits(max_length=40, max_new_tokens=30)
    predictor.check([[4] * 39])
    with pytest.raises(ValueError, match=r"the prompt has 40 tokens, but prompt and answer .* may have 40"):
        predictor.generate([[4] * 40])
    with pytest.raises(ValueError, match="question 2 of 2: the prompt has .* tokens"):
        telechat_predict_utils.answer_all(predictor, [brief("hi"), brief("hello " * 40)], 1)
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
        {"messages": [user, answer], "tools": [tool]},
        {"system": "own\n", "dialog": [user, {"role": "bot", "content": "<tool_call>x</tool_call>"}]},
    ]  # fmt: skip
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    found = read_questions(file, system="given")
    given = {"role": "system", "content": "given"}
    assert [q.messages for q in found[:4]] == [
        [system, user, answer, user],
        [given, user, answer, {"role": "user", "content": "q2"}],
        [given, user, answer, user],
        [given, user],
    ]
    for question, line in zip(found, lines, strict=True):
        prompt = predictor.prompt_ids(question)
        again = telechat_predict_utils.parse_line(json.dumps(line))
        if again.messages[0]["role"] != "system":
            again = again._replace(messages=[given, *again.messages])
        if line is not lines[2]:  # its last turn waits for an answer
            trained = telechat_chat.encode(again.render("chat"), predictor.tokenizer)[0]
            assert trained[: len(prompt)] == prompt and predictor.tokenizer.bot_token_id == prompt[-1]
    file.write_text('{"messages": [}\n')
    with pytest.raises(ValueError, match=r"q.jsonl, line 1: not JSON"):
        read_questions(file)


def test_answers_are_printed_with_their_questions(limits, capsys):
    predictor = limits(max_new_tokens=4)
    telechat_predict_utils.answer_all(predictor, [asked(text) for text in QUESTIONS], batch_size=2)
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

    def ask(self, messages, on_text):
        prompt = self.prompt_ids(Conversation(messages, None, "chat"))
        if not self.fits(prompt):
            raise ValueError("the prompt is too long")
        self.heard.append("".join(map(chr, prompt)))
        on_text("AA")
        return telechat_predict_utils.Answer("AA", [1, 2], False, 1.0, 0.5)


def test_a_conversation_that_outgrows_the_model_forgets_its_oldest_turns(capsys):
    predictor = Scripted(max_length=9)
    telechat_predict_utils.chat(predictor, "S", ["b\n", "\n", "c", "d", " /new \n", "e"])
    # system message, then turns of one character and answers of two: a third question is too much
    assert predictor.heard == ["Sb", "SbAAc", "SbAAcAAd"[:8]] + ["Se"]
    said = capsys.readouterr()
    assert said.out == "AA\n" * 4
    predictor = Scripted(max_length=8)
    telechat_predict_utils.chat(predictor, "S", ["b", "c", "d", "e"])
    assert predictor.heard == ["Sb", "SbAAc", "ScAAd", "SdAAe"]
    assert capsys.readouterr().err.count("its oldest question and answer are forgotten") == 2
    with pytest.raises(ValueError, match="too long"):
        telechat_predict_utils.chat(Scripted(max_length=8), "S", ["b", "12345678"])


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
        (["--yaml_file", config_file, "--batch_size", "0"], "--batch_size is 0"),
        (["--yaml_file", typo, *vocab, *weights], "'num_layer'.* did you mean 'num_layers'"),
        (["--yaml_file", small, *vocab, *weights], "tokens, but the YAML's vocab_size is 500"),
        (["--yaml_file", ascend, *vocab, *weights], "Ascend"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, said in cases:
        told = predict(*words, "hi", cwd=tmp_path)
        assert (told.returncode, told.stdout) == (1, ""), (words, told.stderr)
        assert told.stderr.startswith("error: ") and told.stderr.count("\n") == 1, (words, told.stderr)
        assert re.search(said, told.stderr), told.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_run_mindformer_answers_a_raw_prompt_with_the_same_ids(random, small_vocab, predictor, tmp_path):
    raw = "<_start><_user>生抽与老抽的区别？<_bot>"
    prompt = telechat_chat.raw_prompt(raw, predictor.tokenizer)
    (answer,) = predictor.generate([prompt])
    file = write_yaml(tmp_path / "predict.yaml", {"max_decode_length": len(prompt) + NEW_TOKENS})
    words = ["--config", file, "--load_checkpoint", random.weights, "--predict_data", raw]
    words += ["--processor.tokenizer.vocab_file", small_vocab, "--run_mode", "predict", "--output_dir", "out"]
    command = [sys.executable, str(CHECKOUT / "run_mindformer.py"), *map(str, words)]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr[-3000:]
    whole = predictor.tokenizer.decode([*prompt, *answer.ids], skip_special_tokens=True)
    assert told.stdout.endswith(f"{whole}\n") and answer.text and whole.endswith(answer.text)
