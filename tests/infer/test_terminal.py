"""Chat at a terminal: long lines, several lines, commands, history, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from person import PROMPT, Person

from research.telechat2.infer import terminal as terminals
from research.telechat2.infer.terminal import HELP, Terminal

CHAT = [sys.executable, Path(__file__).with_name("chat_process.py")]


@pytest.fixture
def person(tmp_path):
    people = []

    def sit_down(**given) -> Person:
        given.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        people.append(Person(CHAT, tmp_path, **given))
        people[-1].sees(PROMPT)
        return people[-1]

    yield sit_down
    for one in people:
        one.process.kill()


def test_lines_of_any_length_and_of_several_lines_are_one_question(person):
    """A terminal by itself cuts at 4,095 bytes; pasted text comes between two marks."""
    chat = person()
    assert "system text: 你是中国电信" in chat.seen and "the chat format's own" in chat.seen
    chat.asks("x" * 9000, "<u9000>")
    chat.asks("/new", "")
    chat.asks("星" * 5000, "<u5000>")
    chat.asks("/new", "")
    chat.asks("\x1b[200~one\ntwo\n\nthree\x1b[201~", "<u14>")
    chat.asks("/clear", "")
    chat.asks("one\\\rtwo\\\rthree", "<u13>")
    chat.asks("/RESET", "")
    chat.asks('"""one\r\r  two"""', "<u10>")
    chat.asks("", "")
    chat.asks("\u3000\u200b", "")
    chat.asks("/hlep", "/hlep is no command")
    chat.asks("／ｎｅｗ", "")
    chat.asks("help", HELP.splitlines()[-1])
    chat.asks(" /etc", "<u4>")
    chat.types("\x04")
    assert chat.leaves() == 0


def test_what_is_typed_while_the_model_answers_is_whole(person):
    chat = person()
    chat.types("slow\r")
    chat.sees("~~")
    chat.types("y" * 6000)
    chat.sees(PROMPT)
    chat.sees("y" * 50)
    chat.types("\r")
    chat.sees("<u4 a104 u6000>")
    chat.sees(PROMPT)
    chat.types("/bye\r")
    assert chat.leaves() == 0
    assert "yy" not in chat.seen[: chat.seen.rindex("~")]  # not shown in the answer


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(person, tmp_path):
    chat = person()
    chat.types("slow\r")
    chat.sees("~~~")
    chat.types("\x03")
    chat.sees("cut off there by Ctrl-C")
    chat.sees(PROMPT)
    chat.types("ab\r")
    assert 7 <= int(chat.sees(" u2>").split("<u4 a")[1]) <= 103  # what was shown is in the conversation
    chat.sees(PROMPT)
    chat.types("half a line")
    chat.sees("half a line")  # readline waits for more
    chat.types("\x03")
    chat.sees("Ctrl-C once more leaves")
    chat.sees(PROMPT)
    chat.asks("slow?", "~")  # a question between: it counts from the beginning
    chat.types("slow!\r")
    chat.sees("~~~")
    chat.types("\x03")
    chat.sees(PROMPT)
    chat.types("…")
    chat.sees("…")
    chat.types("\x03")
    assert chat.leaves() == 130
    assert chat.seen.endswith("interrupted\r\n") and "Traceback" not in chat.seen


def test_what_ends_a_process_ends_a_person_who_thinks(person):
    """SIGTERM, as `docker stop` and `kill` send it."""
    chat = person()
    chat.types("half a line")
    chat.sees("half a line")
    os.kill(chat.process.pid, signal.SIGTERM)
    assert chat.leaves() == 130
    assert chat.seen.endswith("interrupted\r\n") and "Traceback" not in chat.seen


def test_the_end_of_input_inside_a_question_is_named(person):
    for begun in ('"""one', "one\\"):
        chat = person()
        chat.types(f"{begun}\r")
        chat.sees("... ")
        chat.types("\x04")
        assert chat.leaves() == 0
        assert "(not asked: its last line is missing)" in chat.seen


@pytest.mark.parametrize("name", ["LC_ALL", "LC_CTYPE", "LANG"])
def test_chinese_can_be_typed_in_the_locale_c(person, name):
    """Python reads UTF-8 there, but readline takes what is no ASCII for keys."""
    others = {other: "" for other in ("LC_ALL", "LC_CTYPE", "LANG")}
    chat = person(**others | {name: "C"})
    chat.asks("你好", "<u2>")
    chat.types("/exit\r")
    assert chat.leaves() == 0


def test_questions_are_kept_for_the_next_time(person, tmp_path):
    chat = person()
    chat.asks("first", "<u5>")
    chat.asks("一\\\r二", "u3>")
    chat.types("exit\r")
    assert chat.leaves() == 0
    (kept,) = (tmp_path / "state").rglob("*.jsonl")
    assert kept.read_text(encoding="utf-8") == '"first"\n"一\\n二"\n' and kept.stat().st_mode & 0o777 == 0o600
    chat = person()
    chat.asks("\x1b[A", "<u3>")
    chat.asks("\x1b[A\x1b[A\x1b[A", "u5>")
    chat.types("退出\r")
    assert chat.leaves() == 0


def test_answers_go_to_a_pipe_and_the_person_still_has_readline(person):
    chat = person(stdout=subprocess.PIPE, XDG_STATE_HOME="/proc/none")  # nor can history be kept
    chat.types("z" * 5000 + "\r")
    chat.sees(PROMPT)
    chat.types("/quit\r")
    assert chat.leaves() == 0
    assert chat.process.stdout.read() == b"<u5000>\n"


@pytest.mark.slow
def test_ctrl_c_while_the_model_compiles_and_answers(random, small_vocab, config_file, tmp_path):
    """MindSpore takes SIGINT to itself while a graph runs, and turns it into SIGTERM."""
    script = Path(__file__).resolve().parents[2] / "research" / "telechat2" / "run_telechat_predict.py"
    command = [sys.executable, script, "--yaml_file", config_file, "--vocab_file_path", small_vocab]
    command += ["--checkpoint_path", random.weights, "--max_new_tokens", 200]
    (tmp_path / "tmp").mkdir()
    chat = Person(command, tmp_path, TMPDIR=str(tmp_path / "tmp"))
    chat.sees("TeleChat2: ", 120)
    chat.sees(PROMPT)
    for again in ("once", "twice", "thrice"):
        chat.types(f"{again}\r")
        chat.sees(f"{again}\r\n")
        time.sleep(0.5)
        chat.types("\x03")
        chat.sees("cut off there by Ctrl-C", 60)
        chat.sees(PROMPT)
    chat.asks("/new", "")
    chat.asks("to the end", "tokens, cut off there by the YAML")
    chat.types("and again\r")
    time.sleep(0.5)
    chat.types("\x03")
    time.sleep(0.1)
    chat.types("\x03")
    assert chat.leaves() == 130
    assert "Traceback" not in chat.seen and os.listdir(tmp_path / "tmp") == []


def lines_of(monkeypatch, *typed: str) -> list[str]:
    """What a terminal without readline makes of lines."""
    typed = iter(typed)

    def read(prompt):
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    return list(Terminal().lines())


@pytest.mark.parametrize(
    "word", ["exit", "Quit", "/bye", "/EXIT", "/quit ", " exit", "exit()", ":q", "/q", "退出", "／ｅｘｉｔ"]
)
def test_words_that_leave(monkeypatch, word):
    assert lines_of(monkeypatch, "a", word, "b") == ["a", "/exit"]


def test_words_that_are_questions(monkeypatch):
    said = ["exit the vim editor", "bye", "how to quit?", "/etc/passwd 是什么", "/1", "quit smoking", "a\\b"]
    assert lines_of(monkeypatch, *said) == said
    assert lines_of(monkeypatch, "/clear", "/?", "/nwe", "x") == ["/new", "/help", "x"]
    assert lines_of(monkeypatch, '""" one line """', '"""', "a", '"""', "b\\", "c") == [
        " one line ",
        "a",
        "b\nc",
    ]


def test_a_line_that_the_terminal_has_cut_is_not_asked(monkeypatch, capsys):
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    assert lines_of(monkeypatch, "x" * 4094, "星" * 1365, "y") == ["x" * 4094, "y"]
    assert "4,095 bytes" in capsys.readouterr().err


def test_a_history_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "broken").write_bytes(b'"a"\n\xff\n')
    for name in ("broken", "absent", "."):
        assert terminals._read_history(tmp_path / name) == []
