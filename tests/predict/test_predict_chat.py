"""Questions of files, and conversations: what is asked, printed, forgotten and refused."""

import json

import pytest
from predict_model import QUESTIONS, asked

from research.telechat2 import telechat_chat, telechat_predict_utils
from research.telechat2.data.formats import Conversation, parse_line
from research.telechat2.telechat_predict_chat import answer_all, chat, read_questions


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
            assert trained[: len(prompt)] == prompt and predictor.tokenizer.special_id("<_bot>") == prompt[-1]
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
