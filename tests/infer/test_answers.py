"""What an answer is: drawn as the settings say, ended by a person or a limit, never made of no numbers."""

import json
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from mindspore import Tensor
from predict_model import NEW_TOKENS, QUESTIONS, asked, oracle_answer, write_yaml
from refusal import refused

from research.telechat2.generation.answer import STOPPED
from research.telechat2.infer.chat import (
    answer_all,
    chat,
    name_settings_without_effect,
    name_system_texts,
    question,
    read_questions,
)
from research.telechat2.infer.loading import load_predictor
from research.telechat2.infer.terminal import COMMANDS
from research.telechat2.telechat_tokenizer import TelechatTokenizer
from research.telechat2.text.chat import DEFAULT_SYSTEM


# ---------------------------------------------------------------------- sampling
def test_first_tokens_come_as_often_as_the_oracles_softmax_says(limits, random):
    """600 draws through ``generate``, in batches of 60; the third is drawn, and nothing beyond it."""
    predictor = limits(do_sample=True, top_k=3, temperature=0.7, max_new_tokens=1)
    prompt, count = [4, 20, 21], 600
    np.random.seed(11)
    answers = [answer for _ in range(count // 60) for answer in predictor.generate([prompt] * 60)]
    with torch.no_grad():
        logits = random.oracle(torch.tensor([prompt])).logits[0, -1].double()
    likeliest = logits.topk(3)
    expected = torch.softmax(likeliest.values / 0.7, 0).numpy() * count
    drawn = [answer.ids[0] for answer in answers]
    found = np.array([drawn.count(token) for token in likeliest.indices.tolist()])
    assert found.sum() == count and expected[2] > 50
    assert ((found - expected) ** 2 / expected).sum() < 25  # 2 degrees: once in 300,000 runs


def test_a_drawn_answer_depends_neither_on_neighbours_nor_on_the_batch(limits):
    predictor = limits(do_sample=True, top_k=50, temperature=1.5)
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS]

    def answers(*batches):
        np.random.seed(3)
        return [answer.ids for batch in batches for answer in predictor.generate(batch)]

    together = answers(prompts)
    assert together == answers(*([prompt] for prompt in prompts)) == answers(prompts[:1], prompts[1:])
    assert together != [answer.ids for answer in predictor.generate(prompts)]  # the numbers go on
    (again,) = predictor.model.generate(np.array([prompts[2]]), seed=5, max_new_tokens=9, do_sample=True)
    (same,) = predictor.model.generate(np.array([prompts[2]]), seed=5, max_new_tokens=9, do_sample=True)
    assert again.tolist() == same.tolist()


def test_a_neighbour_does_not_change_what_is_penalized(limits, random):
    """The padding behind a shorter prompt is no token of it, nor is its length that of the longest."""
    predictor = limits(repetition_penalty=1.8, min_new_tokens=4)
    prompts = [[4, 20, 21], predictor.prompt_ids(asked(QUESTIONS[1]))]
    expected = [
        random.oracle.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW_TOKENS,
            do_sample=False, eos_token_id=2, pad_token_id=3, repetition_penalty=1.8, min_new_tokens=4,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip
    assert [answer.ids for answer in predictor.generate(prompts)] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", math.nan), ("temperature", math.inf), ("top_k", -1), ("repetition_penalty", math.nan),
     ("do_sample", "False")],
)  # fmt: skip
def test_settings_that_are_none_are_refused_wherever_they_stand(
    random, small_vocab, config_file, tmp_path, limits, name, value
):
    with refused(name, value):
        load_predictor("no.yaml", generation={name: value})  # before anything is read
    file = write_yaml(tmp_path / "p.yaml", {name: value})
    with refused(name, value):
        load_predictor(file, small_vocab, random.weights)
    with refused(name, value):
        limits(**{name: value}).generate([[4, 20]])


def test_a_misspelt_setting_is_refused():
    with refused("temprature", "temperature"):
        load_predictor("no.yaml", generation={"temprature": 0.5})


@pytest.mark.parametrize(
    ("given", "named"),
    [({"seed": -1}, ("seed", -1)), ({"seed": "a"}, ("seed", "'a'")),
     ({"prompt_format": "chatml"}, ["'chatml'"]), ({"max_length": 0}, ("max_length", 0)),
     ({"generation": {"max_new_tokens": 0}}, ("max_new_tokens", 0))],
)  # fmt: skip
def test_arguments_that_are_none_are_refused_before_anything_is_read(given, named):
    with refused(*named):
        load_predictor("no.yaml", **given)


def test_the_models_own_generate_refuses_what_it_cannot_take(predictor):
    """An id outside the embedding would end MindSpore's graph, and every later answer of the process."""
    model, few = predictor.model, {"max_new_tokens": 2}
    size = model.config.vocab_size
    for arguments, named in (
        ({"temprature": 0.5}, ("temprature", "temperature")),
        ({"do_sample": True, "seed": -1}, ("seed", -1)),
    ):
        with refused(*named):
            model.generate([[4, 20]], **few, **arguments)
    for rows, named in (
        ([[4, size]], ("prompt 1 of 1", size, "position 1")),
        ([[4, 20], [-5, 4]], ("2 of 2", -5)),
    ):
        with refused(*named):
            model.generate(rows, **few)
    found = np.array(model.generate([[4, size - 1]], eos_token_id=2, **few))
    assert found.tolist() == np.array(model.generate([[4, size - 1]], eos_token_id=[2], **few)).tolist()


def test_settings_that_draw_nothing_are_named(limits, capsys):
    name_settings_without_effect(limits(top_k=5, temperature=0.7, top_p=1.0))
    assert capsys.readouterr().err.startswith("--temperature 0.7, --top_k 5: without effect")
    name_settings_without_effect(limits(do_sample=True))
    name_settings_without_effect(limits(do_sample=False, top_k=None, temperature=1))
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------- logits that are no numbers
@pytest.fixture
def broken_weight(predictor):
    """One infinite value in the last layer, as a file may have it."""
    weight = predictor.model.model.layers[1].attention.wo.weight
    sound = weight.asnumpy().copy()
    broken = sound.copy()
    broken[0, 0] = np.inf
    weight.set_data(Tensor(broken))
    yield
    weight.set_data(Tensor(sound))


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"repetition_penalty": 1.2}], ids=str)
def test_weights_that_are_no_numbers_are_an_error(limits, broken_weight, settings):
    predictor = limits(**settings)
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS[:2]]
    for batch, row in ((prompts, "row 1 of 2"), (prompts[:1], "")):
        with refused("token 1", row, f"position {len(prompts[0])}", "600 of 600"):
            predictor.generate(batch)
    with refused("600 of 600"):
        chat(predictor, None, ["x"])  # not one that cannot be asked


# ---------------------------------------------------------------------- stopped, and cut
def test_a_stopped_answer_is_what_was_shown_and_the_next_one_is_right(limits, random, capsys):
    """The conversation goes on as one would that has this answer in its history from the beginning."""
    predictor = limits(max_new_tokens=NEW_TOKENS)
    shown = []
    answer = predictor.ask(asked(QUESTIONS[0]).messages, on_text=shown.append, stop=lambda: len(shown) == 5)
    prompt = predictor.prompt_ids(asked(QUESTIONS[0]))
    assert answer.ids == oracle_answer(random, prompt, 5) and answer.cut == STOPPED
    assert answer.text == "".join(shown) and "5 tokens, cut off there by Ctrl-C" in str(answer)

    chat(predictor, None, [QUESTIONS[0], "and then?", "/new", "x"], Impatient(after=5))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == answer.text
    history = [*asked(QUESTIONS[0]).messages, {"role": "assistant", "content": answer.text},
               {"role": "user", "content": "and then?"}]  # fmt: skip
    for line, messages in ((second, history), (third, asked("x").messages)):
        prompt = predictor.prompt_ids(asked("")._replace(messages=messages))
        whole = TelechatTokenizer(predictor.tokenizer.vocab_file, whole_characters=True)
        assert line == whole.decode(oracle_answer(random, prompt, NEW_TOKENS), skip_special_tokens=True)


class Impatient:
    """A terminal whose person presses Ctrl-C in the first answer, when it has so many tokens."""

    def __init__(self, after: int):
        self.left = after + 1  # the prompt comes first

    @contextmanager
    def answering(self):
        yield self.stop

    def stop(self) -> bool:
        self.left -= 1
        return self.left == 0


def test_an_answer_stopped_before_its_first_character_takes_the_question_back(limits, monkeypatch, capsys):
    predictor, heard = limits(max_new_tokens=3), []

    def prompt_ids(conversation):
        heard.append([message["content"] for message in conversation.messages])
        return [4, 20, 21]

    monkeypatch.setattr(predictor, "prompt_ids", prompt_ids)
    chat(predictor, None, ["one", "two"], Impatient(after=0))
    assert heard[-1] == ["two"] and capsys.readouterr().err.count("the question is taken back") == 1


@pytest.mark.parametrize("text", ["ab😀", "龘a", "𠮷野家", "👩🏽\u200d💻", "plain"])
def test_an_answer_cut_inside_a_character_ends_before_it(limits, monkeypatch, text):
    """Wherever the limit falls; on the screen, and in the text, which is the history of the next question."""
    predictor = limits(max_new_tokens=100)
    ids = predictor.tokenizer.encode_text(text)
    for count in range(1, len(ids) + 1):
        limits(max_new_tokens=count)
        monkeypatch.setattr(predictor.model, "generate", partial(says, ids[:count]))
        shown = []
        answer = predictor.ask(asked("q").messages, on_text=shown.append)
        exact = predictor.tokenizer.decode(ids[:count])  # with U+FFFD for each byte of what is unfinished
        assert answer.cut and answer.text == "".join(shown) == exact.rstrip("\ufffd")
    assert answer.text == text


def says(ids, rows, streamer, **settings):
    """``generate`` of a model that says ``ids``."""
    for value in (rows, *ids):
        streamer.put(value)
    return [np.concatenate([rows[0], ids])]


def test_a_character_that_the_model_leaves_unfinished_is_shown_as_such(limits, monkeypatch):
    """Not cut: the model has ended its answer there itself."""
    predictor = limits(max_new_tokens=100)
    ids = [*predictor.tokenizer.encode_text("a😀")[:-1], predictor.tokenizer.eos_token_id]
    monkeypatch.setattr(predictor.model, "generate", partial(says, ids))
    shown = []
    answer = predictor.ask(asked("q").messages, on_text=shown.append)
    assert answer.text == "".join(shown) == predictor.tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.text.startswith("a�") and not answer.cut


def test_a_tokenizer_of_answers_leaves_an_unfinished_character_out(small_vocab):
    whole, exact = TelechatTokenizer(small_vocab, whole_characters=True), TelechatTokenizer(small_vocab)
    ids = [4, *exact.encode_text("生抽 👩🏽‍💻 ok"), 2]
    for end in range(1, len(ids) + 1):
        for skip in (True, False):
            text = exact.decode(ids[:end], skip_special_tokens=skip)
            assert whole.decode(ids[:end], skip_special_tokens=skip) == text.rstrip("�")
    broken = exact.encode_text("😀")[1:]
    assert whole.decode([*broken, 2]) == exact.decode([*broken, 2])  # in mid-text it is shown


# ---------------------------------------------------------------------- system text, blanks
def test_an_empty_system_text_is_one_and_none_is_the_chat_formats(predictor, tmp_path, capsys):
    tokenizer = predictor.tokenizer
    system, user, bot = map(tokenizer.vocabulary.special_ids.get, ("<_system>", "<_user>", "<_bot>"))
    rest = [user, *tokenizer.encode_text("q"), bot]
    by_hand = {
        text: [system, *tokenizer.encode_text(f"{said}\n"), *rest]
        for text, said in ((None, DEFAULT_SYSTEM), ("", ""), ("S", "S"))
    }
    file = tmp_path / "q.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "q"}]}, {"instruction": "q", "output": "a"},
        {"input": "<_user>q<_bot>", "output": "a"}, {"conversations": [{"from": "human", "value": "q"},
                                                                     {"from": "gpt", "value": "a"}]},
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    for text, ids in by_hand.items():
        assert predictor.prompt_ids(question("q", text)) == ids
        for waiting in read_questions(file, text):
            assert predictor.prompt_ids(waiting) == ids, (text, waiting)
        name_system_texts(predictor, [question("q", text)], text)
        said = capsys.readouterr().err
        assert said.startswith(f"system text: {'(empty)' if text == '' else text or DEFAULT_SYSTEM} (")
    own = [question("q", "own"), question("q"), question("q")]
    name_system_texts(predictor, own, None)
    assert capsys.readouterr().err.startswith(f"system text of 2 of 3 questions: {DEFAULT_SYSTEM}")
    name_system_texts(predictor, own[:1], "S")
    assert "--system is not used" in capsys.readouterr().err


def test_an_empty_system_text_is_nothing_to_the_plain_format(predictor, monkeypatch, capsys):
    monkeypatch.setattr(predictor, "prompt_format", "plain")
    assert predictor.prompt_ids(question("q", "")) == predictor.prompt_ids(question("q"))
    name_system_texts(predictor, [question("q")], None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "blank", ["", " ", "\t\n", "\u3000\u3000", "\u200b", "\ufeff", "\u2060 \u00ad", "\u3164"]
)
def test_a_question_of_blanks_is_none(predictor, blank, capsys):
    with refused("question 2 of 3"):
        answer_all(predictor, [question("a"), question(blank), question("b")], 1)
    assert chat(predictor, None, [f"{blank}\n"]) == 0
    assert capsys.readouterr().out == ""


def test_what_is_short_is_not_blank(predictor):
    for text in (".", "？", "0", "-", "\u0301", "\ue000", "☃", "<_end>"):
        predictor.prompt_ids(question(text))


def test_commands_of_a_conversation_that_no_person_types(limits, capsys):
    predictor = limits(max_new_tokens=2)
    assert chat(predictor, None, ["/help", "x", "/clear", "exit", "/BYE", "y"]) == 0
    told = capsys.readouterr()
    assert told.err.count("[2 tokens") == 2 and "/exit" in told.err  # the word alone is a question here
    assert {"/new", "/clear", "/exit", "/quit", "/bye", "exit", "quit"} <= COMMANDS.keys()
