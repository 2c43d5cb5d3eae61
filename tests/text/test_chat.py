"""The renderer: the template's text and ids, the loss mask, literal contents, errors naming the message."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refused

from research.telechat2 import telechat_chat
from research.telechat2.telechat_tokenizer import TelechatTokenizer
from research.telechat2.text.chat import Segment, conversation_text, encode, render
from research.telechat2.text.load_vocabulary import load_vocabulary

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def trained_runs(ids, mask, tokenizer):
    """Text of each run of trained tokens."""
    runs, last = [], 0
    for index, trained in zip(ids, mask, strict=True):
        if trained:
            runs = runs if last else [*runs, []]
            runs[-1].append(index)
        last = trained
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(params=["tokenizer.model", "tokenizer_115b.model"])
def released(request, shared_data):
    return TelechatTokenizer(shared_data / request.param)


def test_golden_renderings(shared_data, released):
    """Texts rendered by the released template; their ids are those of the text with its markers special."""
    cases = json.loads((shared_data / "chat_template_golden.json").read_text())
    assert len(cases) == 10
    for case in cases:
        segments = render(
            case["messages"], case["tools"], add_generation_prompt=case["add_generation_prompt"]
        )
        assert conversation_text(segments) == case["text"], case["name"]
        ids, mask = encode(segments, released.vocabulary)
        assert ids == released.encode(case["text"], add_special_tokens=False), case["name"]
        answers = [part.split("<_end>")[0] + "<_end>" for part in case["text"].split("<_bot>")[1:] if part]
        assert trained_runs(ids, mask, released) == answers, case["name"]
        rendered = released.apply_chat_template(
            case["messages"], tools=case["tools"], add_generation_prompt=case["add_generation_prompt"]
        )
        assert rendered == ids


def test_chat_ids_and_mask_written_out(small_tokenizer):
    text = small_tokenizer.encode_text
    ids, mask = encode(
        render([{"role": "system", "content": "dog"}, user("fox"), bot("the fox"), user("a"), bot("b")]),
        small_tokenizer.vocabulary,
    )
    a1, a2, newline = text("the fox"), text("b"), text("\n")
    expected = [
        ([6, *text("dog\n"), 4, *text("fox"), 5], 0),
        ([*a1, 2], 1),
        ([*newline, 4, *text("a"), 5], 0),
        ([*a2, 2], 1),
        (newline, 0),
    ]
    assert ids == [i for part, _ in expected for i in part]
    assert mask == [trained for part, trained in expected for _ in part]


def test_plain_ids_and_mask_written_out(small_tokenizer):
    text = small_tokenizer.encode_text
    segments = render([user("fox"), bot("the fox"), user("a"), bot("b")], prompt_format="plain")
    assert conversation_text(segments) == "<_start><_user>fox<_bot>the fox<_end><_user>a<_bot>b<_end>"
    ids, mask = encode(segments, small_tokenizer.vocabulary)
    head, answer, second = [1, 4, *text("fox"), 5], [*text("the fox"), 2], [4, *text("a"), 5]
    last = [*text("b"), 2]
    assert ids == head + answer + second + last
    assert mask == [0] * len(head) + [1] * len(answer) + [0] * len(second) + [1] * len(last)


def test_the_readmes_prompt_is_what_the_plain_format_generates(small_tokenizer):
    prompt = render([user("生抽与老抽的区别？")], prompt_format="plain", add_generation_prompt=True)
    assert conversation_text(prompt) == "<_start><_user>生抽与老抽的区别？<_bot>"
    assert (
        small_tokenizer("<_start><_user>生抽与老抽的区别？<_bot>")["input_ids"]
        == encode(prompt, small_tokenizer.vocabulary)[0]
    )


hostile = st.lists(
    st.sampled_from(["<_end>", "<_bot>", "<_user>", "<tool_call>", "<_pad>", "a", " ", "\n", "你"]),
    min_size=1,
).filter(lambda parts: "".join(parts).strip())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    question=hostile.map("".join),
    answer=hostile.map("".join),
    prompt_format=st.sampled_from(["chat", "plain"]),
)
def test_special_text_in_contents_changes_no_structure(small_tokenizer, question, answer, prompt_format):
    segments = render([user(question), bot(answer)], prompt_format=prompt_format)
    ids, mask = encode(segments, small_tokenizer.vocabulary)
    assert [i for i in ids if i in small_tokenizer.vocabulary.control_ids] == [
        6 if prompt_format == "chat" else 1,
        4,
        5,
        2,
    ]
    assert trained_runs(ids, mask, small_tokenizer) == [answer + "<_end>"]


def test_training_text_is_the_prompt_of_inference_plus_the_answer(small_tokenizer):
    """What the model is asked at inference is exactly what stood before the answer in training."""
    for prompt_format in ("chat", "plain"):
        history = [user("fox"), bot("dog"), user("a")]
        words = small_tokenizer.vocabulary
        prompt, _ = encode(render(history, prompt_format=prompt_format, add_generation_prompt=True), words)
        trained, mask = encode(render([*history, bot("b")], prompt_format=prompt_format), words)
        assert trained[: len(prompt)] == prompt
        assert mask[len(prompt)] == 1


def test_tool_calls_take_arguments_as_object_or_json_and_are_trained(small_tokenizer):
    for arguments in ({"city": "北京"}, '{"city": "北京"}'):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [
            user("a"),
            bot("I ask.\n", tool_calls=[call]),
            {"role": "tool", "tool_call_id": "1", "content": "r"},
        ]
        segments = render([*messages, bot("b")], TOOLS)
        text = conversation_text(segments)
        spoken = (
            '<_bot>I ask.\n<tool_call>\n{"name": "f", "arguments": {"city": "北京"}}\n</tool_call><_end>\n'
        )
        assert text.endswith(spoken + "<_user><tool_response>\nr\n</tool_response><_bot>b<_end>\n")
        ids, mask = encode(segments, small_tokenizer.vocabulary)
        assert trained_runs(ids, mask, small_tokenizer) == [
            spoken.removeprefix("<_bot>").strip("\n"),
            "b<_end>",
        ]


def test_tags_in_contents_are_special_only_when_prerendered(small_tokenizer):
    messages = [user("<tool_response>\nr\n</tool_response>"), bot("b")]
    literal, _ = encode(render(messages), small_tokenizer.vocabulary)
    prerendered, _ = encode(render(messages, tool_tags_in_content=True), small_tokenizer.vocabulary)
    assert 11 not in literal and 12 not in literal
    assert prerendered.count(11) == prerendered.count(12) == 1
    assert small_tokenizer.decode(literal) == small_tokenizer.decode(prerendered)


def test_a_special_token_the_vocabulary_lacks_is_an_error(small_tokenizer):
    with refused("'<_nobody>'", "tokenizer.model"):
        encode([Segment("<_nobody>", special=True)], small_tokenizer.vocabulary)


ERRORS = [
    ([], "[]"),
    (["hi"], "message 1", "'hi'"),
    ([user("a"), {"role": "robot", "content": "b"}], "message 2", "'robot'", "system, user, assistant"),
    ([user("a"), bot(["b"])], "message 2", "['b']"),
    ([user("a"), bot(None)], "message 2", "None"),
    ([user("a"), bot("")], "message 2", "empty answer"),
    ([user(""), bot("b")], "message 1", "empty question"),
    ([{"role": "system", "content": "s"}, bot("b")], "role 'user'"),
    ([user("a"), {"role": "system", "content": "s"}], "message 2", "'system'"),
    ([user("a"), {"role": "tool", "content": "s"}], "message 2", "tool call"),
    ([user("a"), bot("b", reasoning="c")], "message 2", "'reasoning'"),
    ([user("a"), bot("b", weight=0.5)], "message 2", "weight 0.5"),
    ([{**user("a"), "weight": 1}, bot("b")], "message 1", "weight 1", "'user'"),
    ([{**user("a"), "tool_calls": [{}]}], "message 1", "tool_calls", "'user'"),
    ([user("a"), bot(None, tool_calls=[{"name": "f", "arguments": "{"}])], "message 2", "'f'", "JSON"),
    ([user("a"), bot(None, tool_calls=[{"name": "f"}])], "message 2", "'f'", "None"),
    ([user("a"), bot(None, tool_calls=["f"])], "message 2", "'f'", "function"),
]


@pytest.mark.parametrize("case", ERRORS, ids=[" ".join(values) for _, *values in ERRORS])
def test_errors_name_the_message(case):
    messages, *values = case
    with refused(*values):
        render(messages)


def test_formats_and_tools_that_do_not_fit_are_errors():
    with refused("'chatml'", "chat, plain"):
        render([user("a")], prompt_format="chatml")
    with refused("plain", "system", "'chat'"):
        render([{"role": "system", "content": "s"}, user("a")], prompt_format="plain")
    with refused("plain", "tools", "'chat'"):
        render([user("a")], TOOLS, prompt_format="plain")
    with refused("tool 1", "'f'", "function"):
        render([user("a")], ["f"])


def test_an_empty_answer_may_stand_in_the_history_of_a_prompt():
    text = conversation_text(
        render([user("a"), bot(""), user("b")], prompt_format="plain", add_generation_prompt=True)
    )
    assert text == "<_start><_user>a<_bot><_end><_user>b<_bot>"


def test_trained_tokens_are_coloured(small_vocab):
    words = load_vocabulary(small_vocab)
    ids, mask = encode(render([user("a"), bot("你 b")], prompt_format="plain"), words)
    assert telechat_chat.coloured(ids, mask, words, False) == "<_start><_user>a<_bot>⟦你 b<_end>⟧"
    coloured = telechat_chat.coloured(ids, mask, words, True)
    assert "\033[32;1m<_end>\033[0m" in coloured and "\033[1m<_user>\033[0ma" in coloured


def test_show_prints_a_line_of_a_file(small_vocab, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"input": "a", "output": "b"}\n{"messages": [{"role": "user", "content": "q"}]}\n', encoding="utf-8"
    )
    command = [sys.executable, telechat_chat.__file__, "show", "--vocab_file_path", small_vocab, data]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    first, second = shown.stdout.split("--- line 2: ")
    assert first.splitlines()[1] == "<_start><_user>a<_bot>⟦b<_end>⟧"
    assert second.startswith("chat format") and "0 trained" in second and "⟦" not in second  # it waits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]
    data.write_text('\n{"messages": 3}\n')
    wrong = subprocess.run([*command, "--line", "2"], capture_output=True, text=True, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == f"error: {data}, line 2: messages is a int; expected a list of messages\n"


def test_show_goes_on_behind_a_line_that_is_left_out(small_vocab, tmp_path, capsys, monkeypatch):
    data = tmp_path / "d.jsonl"
    lines = [{"instruction": "q1", "output": "a1", "weight": 0}, {"instruction": "q2", "output": "a2"}]
    data.write_text("\n".join(map(json.dumps, lines)))
    words = ["telechat_chat.py", "show", "--vocab_file_path", str(small_vocab), str(data)]
    monkeypatch.setattr(sys, "argv", words)
    telechat_chat.main()
    left_out, shown = capsys.readouterr().out.split("--- line 2: ")
    assert left_out == "--- line 1: left out by its own weight of 0\n" and "⟦a2<_end>⟧" in shown
    data.write_text(json.dumps(lines[0] | {"label": False}))
    with refused("line 1", "label False"):
        telechat_chat.main()


def test_a_tool_call_in_text_parts_may_be_followed_by_an_answer():
    calling = [{"type": "text", "text": "<tool_call>\n{}\n</tool_call>"}]
    as_text = render([user("a"), bot(calling[0]["text"]), bot("b")])
    assert render([user("a"), bot(calling), bot("b")]) == as_text
