"""Questions of files, and conversations: what is asked, printed, forgotten and refused."""

import gzip
import json
import os

from predict_model import QUESTIONS, asked
from refusal import refused

from research.telechat2.common.errors import UsageError
from research.telechat2.data.conversions import Conversation
from research.telechat2.data.formats import parse_line
from research.telechat2.generation.answer import Answer
from research.telechat2.infer.chat import answer_all, chat, question, read_prompts, read_questions
from research.telechat2.text import chat as telechat_chat


def test_questions_of_a_text_file(tmp_path):
    file = tmp_path / "q.txt"
    file.write_bytes("\ufeff第一？\r\n\n  indented\n<_end>".encode())
    found = read_questions(file, system="S")
    assert [q.messages[1:] for q in found] == [
        [{"role": "user", "content": text}] for text in ("第一？", "  indented", "<_end>")
    ]
    assert all(q.messages[0] == {"role": "system", "content": "S"} for q in found)
    file.write_text("\n \n")
    with refused("q.txt"):
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
            trained = telechat_chat.encode(again.render("chat"), predictor.tokenizer.vocabulary)[0]
            assert (
                trained[: len(prompt)] == prompt
                and predictor.tokenizer.vocabulary.special_ids.get("<_bot>") == prompt[-1]
            )
    file.write_text('{"messages": [}\n')
    with refused("q.jsonl, line 1"):
        read_questions(file)


def test_a_test_set_needs_no_answers(tmp_path):
    """Empty, blank, missing, or under the names that test sets give them."""
    asks = [{"role": "user", "content": "q"}]
    lines = [
        *({"instruction": "q", "input": "", "output": ""}, {"instruction": "q"}, {"input": "q"}),
        *({"input": "q", "output": None}, {"instruction": "q", "output": "a", "id": 3}),
        *({"messages": [*asks, {"role": "assistant", "content": text}]} for text in ("", " ", None)),
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
        {"instruction": "q", "answer": "a", "reference": ["b"], "label": False, "response": "c"},
        {"input": "<_user>q<_bot>a<_end>"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
        # marks and text of an answer that is cut off
        *({"instruction": "q", "output": "a", name: value} for name, value in (("weight", 0), ("loss", 0.7))),
        *({"instruction": "q", "output": "a", "kto_tag": value} for value in (False, "x")),
        {"messages": [*asks, {"role": "assistant", "content": "a", "reasoning_content": "r", "weight": 0.5}]},
        {"messages": [{**asks[0], "loss": False}, {"role": "assistant", "content": "a", "images": ["b"]}]},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert [asked.messages for asked in read_questions(file)] == [asks] * len(lines)
    for line, named in (
        ({"instruction": "q", "context": "c"}, "context"),
        ({"messages": [{"role": "user", "content": "\u3000"}]}, "message 1"),
        ({"text": "t"}, "text"),
    ):
        file.write_text(json.dumps(line))
        with refused("q.jsonl, line 1", named):
            read_questions(file)
    file.write_text(json.dumps({"instruction": "q", "context": "c"}))
    assert read_questions(file, ignored={"context"})[0].messages == asks


def test_question_files_are_read_as_data_are(tmp_path, capsys):
    lines = [{"input": f"q{i}", "output": "a"} for i in range(3)]
    text = "\n".join(map(json.dumps, lines))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.NDJSON").write_text(text)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    (tmp_path / "q.JSONL").write_text(text.replace("\n", "\n\ufeff"))
    (tmp_path / "q.json").write_text(json.dumps(lines, indent=1))
    (tmp_path / "q.txt").write_text("q0\n\ufeffq1\n\u3000\nq2")
    (tmp_path / "q.txt.gz").write_bytes(gzip.compress(b"q0\r\nq1\nq2\n"))
    for name in ("folder", "q.jsonl.gz", "q.JSONL", "q.json", "q.txt", "q.txt.gz"):
        found = read_questions(tmp_path / name, system="")
        assert [q.messages[1]["content"] for q in found] == ["q0", "q1", "q2"], name
        assert all(q.messages[0] == {"role": "system", "content": ""} for q in found)
    for name, content in (
        ("data.txt", text),
        ("data", json.dumps(lines)),
        ("data.csv", json.dumps(lines, indent=1)),
    ):
        (tmp_path / name).write_text(content)
        assert [q.messages[0]["content"] for q in read_questions(tmp_path / name)] == ["q0", "q1", "q2"]
        assert "read as data" in capsys.readouterr().err
    reads, writes = os.pipe()  # as a shell gives <(head q.txt)
    os.write(writes, b"q0\nq1\n")
    os.close(writes)
    assert [q.messages[0]["content"] for q in read_questions(f"/dev/fd/{reads}")] == ["q0", "q1"]
    os.close(reads)
    (tmp_path / "list.txt").write_text("[1] means?\n[{")
    assert len(read_questions(tmp_path / "list.txt")) == 2


def test_a_byte_order_mark_on_standard_input_is_no_part_of_the_question():
    predictor = Scripted(max_length=9)
    chat(predictor, None, ["\ufeffb\n"])
    assert predictor.heard == ["b"]


def test_byte_order_marks_of_questions_are_taken_off_or_named(tmp_path, capsys):
    file = tmp_path / "q.txt"
    file.write_text("\ufeff\ufeffq0\ufeff\r\nq1\n\ufeff", encoding="utf-8")
    assert [q.messages[1]["content"] for q in read_questions(file, "\ufeffs")] == ["q0", "q1"]
    assert read_questions(file, "\ufeffs")[0].messages[0]["content"] == "s"
    assert question("\ufeffq").messages[0]["content"] == "q"
    file.write_text("q0\nq1\ufeffq2\n", encoding="utf-8")
    with refused("q.txt, line 2", "U+FEFF", "character 3"):
        read_questions(file)
    with refused("U+FEFF"):
        question("a\ufeffb")
    predictor = Scripted(max_length=9)
    assert chat(predictor, None, ["a\ufeffb\n", "c\n"]) == 1
    assert predictor.heard == ["c"] and "U+FEFF" in capsys.readouterr().err


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
            raise UsageError(f"the prompt has {len(prompts[0])} tokens")

    def ask(self, messages, on_text):
        prompt = self.prompt_ids(Conversation(messages, None, "chat"))
        self.check([prompt])
        self.heard.append("".join(map(chr, prompt)))
        on_text("AA")
        return Answer("AA", [1, 2], "", 1.0, 0.5)


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


def test_a_text_of_windows_is_the_same_question(tmp_path):
    file = tmp_path / "q.txt"
    for content in ("第一行\n\nb \r c\n", "\ufeff第一行\r\n\r\nb \r c\r\n"):
        file.write_bytes(content.encode())
        assert read_prompts(file)[0].messages[0]["content"] == "第一行\n\nb \r c"
    file.write_bytes("what is up?".encode("utf-16-le"))  # without its mark it is UTF-8, of other characters
    for read in (read_prompts, read_questions):
        with refused("q.txt, line 1", "NUL"):
            read(file)
