"""Data formats: what each line becomes, and that nothing in it is lost without an error."""

import json

import pytest
from refusal import refused

from research.telechat2.data.formats import parse, parse_line, read_lines
from research.telechat2.text import exact_json
from research.telechat2.text.chat import conversation_text, render


def text_of(**data) -> str:
    """The rendered conversation of a line."""
    return conversation_text(parse_line(json.dumps(data)).render())


def trained_text(**data) -> str:
    """All that a line trains, joined."""
    return "".join(s.text for s in parse_line(json.dumps(data)).render() if s.trained)


@pytest.mark.parametrize(
    "question",
    ["q", "<_user>q", "<_user>q<_bot>", "<_start><_user>q<_bot>"],
)
def test_the_ways_to_write_a_single_turn_are_one(question):
    assert text_of(input=question, output="a") == "<_start><_user>q<_bot>a<_end>"


@pytest.mark.parametrize(
    "question",
    ["q1<_bot>a1<_user>q2", "<_user>q1<_bot>a1<_user>q2", "<_start><_user>q1<_bot>a1<_end><_user>q2<_bot>"],
)
def test_earlier_turns_stand_in_input_and_are_trained(question):
    assert text_of(input=question, output="a2") == "<_start><_user>q1<_bot>a1<_end><_user>q2<_bot>a2<_end>"
    assert trained_text(input=question, output="a2") == "a1<_end>a2<_end>"


def test_line_breaks_of_earlier_turns_are_kept():
    rendered = text_of(input="q1\n<_bot>a1\n<_user>\nq2", output="a2\n")
    assert rendered == "<_start><_user>q1\n<_bot>a1\n<_end><_user>\nq2<_bot>a2\n<_end>"
    assert text_of(input="q1<_bot>a1<_end>\n<_user>q2", output="a2") == text_of(
        input="q1<_bot>a1<_user>q2", output="a2"
    )


def test_special_text_in_a_question_or_answer_is_text():
    conversation = parse_line(json.dumps({"input": "what is <_end>?", "output": "<_user> is"}))
    assert conversation.prompt_format == "plain"
    assert [m["content"] for m in conversation.messages] == ["what is <_end>?", "<_user> is"]
    assert sum(segment.special for segment in conversation.render()) == 4


def test_messages_with_tools_are_chat():
    tools = [{"type": "function", "function": {"name": "f"}}]
    line = {
        "messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}],
        "tools": tools,
        "id": 7,
    }
    assert parse_line(json.dumps(line)).prompt_format == "chat"
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in text_of(**line)
    assert text_of(**line).endswith("<_user>q<_bot>a<_end>\n")


def test_one_newline_at_the_end_of_a_dialogs_system_is_dropped():
    dialog = [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]
    for system, expected in (("s", "s\n"), ("s\n", "s\n"), ("s\n\n", "s\n\n"), ("", "\n")):
        assert text_of(system=system, dialog=dialog) == f"<_system>{expected}<_user>q<_bot>a<_end>\n"
    assert text_of(dialog=dialog).startswith("<_system>你是中国电信星辰语义大模型")


@pytest.mark.parametrize("before", ["", "\n", "<_start> ", "<_start>\n"])
@pytest.mark.parametrize("behind", ["", "\n", "\r\n", "  "])
def test_white_space_around_the_markers_of_an_older_line_is_no_text(before, behind):
    expected = "<_start><_user>q<_bot>a <_end><_user> r<_bot>b\n<_end>"
    older = f"{before}<_user>q<_bot>a <_end>{behind}<_user> r<_bot>b\n<_end>{behind}"
    assert text_of(input=older) == expected
    assert text_of(input=older.rpartition("b\n")[0], output="b\n") == expected


def test_tool_tags_of_a_dialog_are_special():
    dialog = [{"role": "user", "content": "q"}, {"role": "bot", "content": "<tool_call>\n{}\n</tool_call>"}]
    segments = parse_line(
        json.dumps({"system": "s", "dialog": dialog, "multiturn": False, "tool": True})
    ).render()
    assert [s.text for s in segments if s.special and s.trained] == ["<tool_call>", "</tool_call>", "<_end>"]


def test_the_released_dialogues_render_to_what_the_golden_template_would_say(shared_data):
    """The released files carry the system prompt (and tools) pre-rendered, newline included."""
    for name in ("demo_single", "demo_code", "demo_multi", "demo_tool"):
        for _, line in read_lines(shared_data / f"{name}.jsonl"):
            data = json.loads(line)
            turns = [("<_user>" if m["role"] == "user" else "<_bot>", m["content"]) for m in data["dialog"]]
            body = "".join(mark + text + ("<_end>\n" if mark == "<_bot>" else "") for mark, text in turns)
            assert conversation_text(parse_line(line).render()) == f"<_system>{data['system']}{body}"


def test_openais_text_parts_are_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "fox"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b", "refusal": None}]
    assert text_of(messages=messages).endswith("<_user>a fox<_bot>b<_end>\n")


def test_sharegpt_is_the_same_conversation_as_messages():
    tools = [{"name": "f", "description": "d"}]
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [
        ("human", "q"),
        ("function_call", json.dumps(call)),
        ("observation", "r"),
        ("gpt", "a"),
    ]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    expected = text_of(messages=messages, tools=tools)
    assert text_of(conversations=conversations, system="s", tools=json.dumps(tools)) == expected
    with_system = [{"from": "system", "value": "s"}, *conversations]
    assert text_of(conversations=with_system, tools=tools) == expected
    assert trained_text(conversations=conversations).endswith("</tool_call><_end>a<_end>")
    assert text_of(conversations=conversations, tools="") == text_of(messages=messages[1:])


def test_alpaca_puts_the_input_below_the_instruction():
    rendered = text_of(instruction="Sum up.", input="A text.", output="T.", system="s", history=[["q", "a"]])
    assert rendered == "<_system>s\n<_user>q<_bot>a<_end>\n<_user>Sum up.\nA text.<_bot>T.<_end>\n"
    assert text_of(instruction="i", input="", output="o").endswith("<_user>i<_bot>o<_end>\n")


def test_text_and_data_are_pretraining_texts():
    for key in ("text", "data"):
        kind, parsed = parse(json.dumps({key: "a <_end> b", "url": "x"}))
        assert kind == key
        assert conversation_text(parsed.render()) == "<_start>a <_end> b<_end>"
        assert [s.trained for s in parsed.render()] == [False, True, True]
    for line, *values in (('{"text": ""}', "text", "empty"), ('{"data": [1]}', "data", "list")):
        with refused(*values):
            parse(line)


ERRORS = [
    ("{", "JSON", ".json file"),
    ('{"input": "q", "output"', "JSON"),
    ("[1]", "list"),
    ("{}", "(none)", "input and output"),
    ('{"question": "q", "answer": "a"}', "question, answer", "question to instruction, answer to output"),
    ('{"text": "t"}', "text", "input and output"),
    ('{"conversations": [{"from": "gpt"}]}', "turn 1", "from", "value"),
    ('{"conversations": [{"from": "me", "value": "q"}]}', "turn 1", "'me'", "human"),
    ('{"conversations": [{"from": "gpt", "value": "a", "text": "b"}]}', "message 1", "text"),
    ('{"conversations": [{"from": "function_call", "value": "{"}]}', "turn 1", "JSON"),
    ('{"conversations": [], "tools": "{"}', "tools", "JSON"),
    ('{"conversations": [], "tools": 3}', "tools", "int", "list"),
    ('{"instruction": "i"}', "output", "string"),
    ('{"instruction": "", "output": "a"}', "message 1", "empty question"),
    ('{"instruction": "i", "output": "a", "history": [["q"]]}', "pair 1", "history"),
    ('{"instruction": "i", "output": "a", "history": "q"}', "history", "str", "list"),
    ('{"instruction": "i", "output": "a", "history": 0}', "history", "int", "list"),
    ('{"instruction": "i", "output": "a", "response": "b"}', "response", "beside instruction"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 1", "part 1", "'image'"),
    ('{"messages": [], "functions": [1]}', "functions", "beside messages"),
    ('{"input": "q"}', "output", "string"),
    ('{"output": "a"}', "input", "string"),
    ('{"input": null, "output": "a"}', "input", "NoneType", "string"),
    ('{"response": "i", "input": "q", "output": "a"}', "response", "beside input"),
    ('{"system": "s", "input": "q", "output": "a"}', "system", "beside input"),
    ('{"messages": [], "dialog": [1]}', "dialog", "beside messages"),
    ('{"messages": {}}', "messages", "dict", "list"),
    ('{"messages": [{"role": "user", "content": "q"}], "tools": "f"}', "tools", "JSON"),
    ('{"system": 1, "dialog": []}', "system", "int", "string"),
    ('{"input": "<_system>s<_user>q", "output": "a"}', "input", "<_system>"),
    ('{"input": "<_user>a<_user>b", "output": "a"}', "turn 2", "<_user>", "<_bot>"),
    ('{"input": "<_bot>a<_user>b", "output": "a"}', "turn 1", "<_bot>", "<_user>"),
    ('{"input": "<_user>a<_bot>b", "output": "a"}', "input", "output"),
    ('{"input": "<_user>q<_bot>a", "output": 0}', "input", "output"),
    ('{"input": "q", "output": ""}', "message 2", "empty answer"),
    ('{"input": "<_user>q<_bot><_user>r", "output": "a"}', "message 2", "empty answer"),
    ('{"input": "", "output": "a"}', "message 1", "empty question"),
    ('{"prompt": "q", "completion": "a"}', "prompt to instruction, completion to output"),
    ('{"role": "user", "content": "q"}', '{"messages": […]}'),
    ('{"from": "human", "value": "q"}', '{"conversations": […]}'),
    ('{"Instruction": "q", "Output": "a"}', "'Instruction' to instruction, 'Output' to output"),
    ('{"conversations": [{"role": "user", "content": "q"}]}', "role, content", "called messages"),
    ('{"messages": [{"from": "human", "value": "q"}]}', "from and value", "list conversations"),
    ('{"data": [{"instruction": "q"}]}', "data", "list", "array"),
    ('{"instruction": null, "input": "q", "output": "a"}', "instruction", "NoneType"),
    ('{"instruction": "q", "output": "a"}{"text": "t"}', "character 36"),
    ('{"instruction": "q", "output": "a"}\ufeff{}', "U+FEFF", "character 36"),
    ('{"instruction": "q", "output": "a"},', "comma"),
    ('{"text": "a"}\r{"text": "b"}', r"\r"),
    ('{"instruction": "q", "input": 0, "output": "a"}', "input", "int", "string"),
    ('{"instruction": "q", "input": false, "output": "a"}', "input", "bool", "string"),
    ("PK\3\4abc", "JSON", "zip"),
    ("version https://git-lfs.github.com/spec/v1", "JSON", "git lfs pull"),
    (
        json.dumps(
            {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f", "x": float("nan")}]}
        ),
        "tool 1", "'f'", "NaN",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", ERRORS, ids=[line for line, *_ in ERRORS])
def test_what_cannot_be_used_is_an_error(case):
    line, *values = case
    with refused(*values):
        parse_line(line).render()


@pytest.mark.parametrize("absent", ["null", "NaN"])
def test_a_table_of_several_formats_has_empty_columns(absent):
    columns = ("messages", "dialog", "conversations", "instruction", "input", "output", "text", "system")

    def line(**filled):
        return (
            "{"
            + ", ".join(f'"{key}": {json.dumps(filled[key]) if key in filled else absent}' for key in columns)
            + "}"
        )

    for filled, kind in (
        ({"text": "t"}, "text"),
        ({"instruction": "q", "output": "a"}, "instruction"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "conversations",
        ),
    ):
        assert parse(line(**filled)) == parse(json.dumps(filled))
        assert parse(line(**filled))[0] == kind


def test_tools_may_be_json_in_a_string():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"maximum": 0.1}}}]
    as_list = parse_line(json.dumps({"messages": turns, "tools": tools})).render()
    assert parse_line(json.dumps({"messages": turns, "tools": json.dumps(tools)})).render() == as_list
    without = parse_line(json.dumps({"messages": turns})).render()
    for none in ("", "[]", "null"):
        assert parse_line(json.dumps({"messages": turns, "tools": none})).render() == without


def test_what_is_nested_too_deeply_is_an_error():
    deep = []
    for _ in range(20_000):
        deep = [deep]
    with refused("nested"):
        exact_json.dumps({"x": deep})
    with refused("tool 1", "'f'", "nested"):
        render([{"role": "user", "content": "q"}], [{"name": "f", "x": deep}], add_generation_prompt=True)


def test_lines_are_those_of_the_file_and_utf_8(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y"}\r\n\n{"b": 1}')
    marked = tmp_path / "marked.jsonl"
    marked.write_text("\ufeff\ufeff{}\ufeff\r\n\ufeff\n{}\ufeff", encoding="utf-8")
    assert [line for _, line in read_lines(marked)] == ["{}\r\n", "\n", "{}"]
    assert [(n, line.strip()) for n, line in read_lines(file)] == [
        (1, '{"a": "x\u2028y"}'),
        (2, ""),
        (3, '{"b": 1}'),
    ]
    file.write_bytes('{"a": 1}\n{"a": "你"}'.encode("gbk"))
    with refused("data.jsonl, line 2", "UTF-8", "byte 7"):
        list(read_lines(file))


def test_a_question_without_an_answer_is_a_conversation():
    assert parse_line('{"messages": [{"role": "user", "content": "q"}]}').messages == [
        {"role": "user", "content": "q"}
    ]
