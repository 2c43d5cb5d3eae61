"""Fields that a format does not use: metadata pass and are counted, text that would be lost is an error."""

import json

import pytest
from data_lines import bot, chat, encoded, items, trained_texts, user, write_lines
from refusal import refused

from research.telechat2.data import formats
from research.telechat2.data.fields import METADATA
from research.telechat2.data.formats import parse, parse_line
from research.telechat2.data.html_report import summary
from research.telechat2.data.job import Options
from research.telechat2.data.preparing import prepare
from research.telechat2.text.chat import conversation_text
from research.telechat2.text.load_vocabulary import load_vocabulary

CONVERSATIONS = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
ALPACA = {"instruction": "q", "input": "", "output": "a"}
PLAIN = {"input": "q", "output": "a"}
LINES = [chat("q", "a"), CONVERSATIONS, ALPACA, PLAIN, {"text": "t"}, {"dialog": [user("q"), bot("a")]}]


@pytest.mark.parametrize("line", LINES, ids=lambda line: next(iter(line)))
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("context", "a long text"), ("summary", "s"), ("system_prompt", "s"), ("title", "t")),
        *(("reasoning", "r"), ("chosen", "a"), ("rejected", [bot("b")]), ("images", ["a.png"])),
        *(("image", "b.png"), ("audios", ["a"]), ("persona", {"name": "x"}), ("knowledge", ["k"])),
        *(("function_call", {"name": "f"}), ("answers", [1])),
    ],
)  # fmt: skip
def test_text_that_would_be_lost_is_an_error_that_names_it(line, name, value):
    with refused(name, f"--ignore_fields {name}", kind=formats.UnusableLine):
        parse(json.dumps(line | {name: value}))
    kind, parsed = parse(json.dumps(line | {name: value}), frozenset({name}))
    assert parsed.unused == (name,)
    assert parsed._replace(unused=()) == parse(json.dumps(line))[1]


@pytest.mark.parametrize("line", LINES, ids=lambda line: next(iter(line)))
def test_what_says_nothing_or_holds_no_text_passes(line):
    nothing = {
        "context": "",
        "images": [],
        "history_": None,
        "thought": " \n",
        "meta_x": {},
        "input_": "\u3000",
    }
    assert parse(json.dumps(line | nothing))[1].unused == ()
    assert parse(json.dumps(line)[:-1] + ', "context": NaN}')[1].unused == ()  # as pandas writes it
    numbers = {"length_ratio": 0.5, "multiturn": True, "counts": {"a": 1}}
    assert parse(json.dumps(line | numbers))[1].unused == tuple(numbers)
    metadata = {name: "x" for name in METADATA} | {
        "conversation_id": "1",
        "createdAt": "now",
        "Conversation-ID": "1",
        "userID": "1",
        "Source-Id": ["x"],
    }
    assert set(parse(json.dumps(metadata | line))[1].unused) == metadata.keys()


def test_fields_of_a_message_are_looked_at_too():
    def line(**more):
        return json.dumps({"messages": [user("q"), bot("a", **more)]})

    for name, value in {
        **{"reasoning_content": "r", "thought": "t", "refusal": "no", "audio": {"id": "1"}, "images": ["a"]},
        **{"function_call": {"name": "f", "arguments": "{}"}, "mask": 1, "annotations": [{"url": "u"}]},
    }.items():
        with refused("message 2", name, kind=formats.UnusableLine):
            parse(line(**{name: value}))
        assert parse(line(**{name: value}), frozenset({name}))[1].unused == (name,)
    assert parse(line(refusal=None, tool_calls=[], annotations=[]))[1].unused == ()
    assert parse(line(timestamp="now", id="1", model="m"))[1].unused == ("timestamp", "model")
    assert parse(line(name="Ann"))[1].unused == ("name",)  # counted, as the template does not print it
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "markdown": "**a**"}]
    with refused("message 2", "markdown"):
        parse_line(json.dumps({"conversations": turns}))


def test_preference_data_of_no_known_format_are_named_as_such():
    for line in ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"question": "q", "response_chosen": "a"}):
        with refused("chosen", "DPO"):
            parse(json.dumps(line))


@pytest.mark.parametrize("name", ["label", "kto_tag", "desirable"])
@pytest.mark.parametrize("line", LINES, ids=lambda line: next(iter(line)))
def test_an_answer_labelled_as_bad_is_never_trained(line, name):
    for value in (False, "false", "False"):
        for ignored in (frozenset(), frozenset({name})):
            with refused(name, repr(value), kind=formats.UnusableLine) as caught:
                parse(json.dumps(line | {name: value}), ignored)
            assert caught.value.reason == formats.NOT_TRAINED
    assert parse(json.dumps(line | {name: True})) == parse(json.dumps(line))
    with refused(name, "'positive'", f"--ignore_fields {name}"):
        parse(json.dumps(line | {name: "positive"}))
    assert parse(json.dumps(line | {name: 3}), frozenset({name}))[1].unused == (name,)


@pytest.mark.parametrize("name", ["Label", "KTO_TAG", "is-desirable", "is_good", "correct"])
@pytest.mark.parametrize("line", LINES, ids=lambda line: next(iter(line)))
def test_a_judgement_is_one_however_it_is_spelt(line, name):
    with refused(name, False, kind=formats.UnusableLine) as caught:
        parse(json.dumps(line | {name: False}))
    assert caught.value.reason == formats.NOT_TRAINED
    assert parse(json.dumps(line | {name: True}))[1].render() == parse(json.dumps(line))[1].render()


@pytest.mark.parametrize("line", LINES, ids=lambda line: next(iter(line)))
def test_a_byte_order_mark_before_the_first_column_is_no_part_of_its_name(line):
    """As a table has it that was read with another encoding than it was written in."""
    first, *others = line
    marked = {f"\ufeff{first}": line[first]} | {name: line[name] for name in others}
    assert parse(json.dumps(marked)) == parse(json.dumps(line))
    with refused("label", False, kind=formats.UnusableLine):
        parse(json.dumps({"\ufefflabel": False} | line))
    with refused(f"{first!r}"):
        parse(json.dumps(marked | line))


@pytest.mark.parametrize("line", LINES, ids=lambda line: next(iter(line)))
def test_a_number_that_is_no_mark_may_be_left_out(line):
    with refused("loss", 0.73, "--ignore_fields loss"):
        parse(json.dumps(line | {"loss": 0.73}))
    assert parse(json.dumps(line | {"loss": 0.73}), frozenset({"loss"}))[1].unused == ("loss",)


@pytest.mark.parametrize("line", LINES, ids=lambda line: next(iter(line)))
def test_true_and_absent_judgements_change_nothing(line):
    for name in ("label", "kto_tag"):
        for value in ("true", "True", 1, 1.0, None, "", [], float("nan")):
            assert parse(json.dumps(line | {name: value})) == parse(json.dumps(line)), value
    # a word that may mean something else
    assert parse(json.dumps(line | {"correct": 3}))[1].unused == ("correct",)
    assert parse(json.dumps(line | {"correct": False}), frozenset({"correct"}))[1].unused == ("correct",)


def test_text_inside_parts_and_calls_is_not_lost_either():
    def line(call=None, function=None, part=None):
        calls = [{"id": "1", "type": "function", "index": 0, **(call or {}),
                  "function": {"name": "f", "arguments": "{}", **(function or {})}}]  # fmt: skip
        parts = [{"type": "text", "text": "q", **(part or {})}]
        return json.dumps({"messages": [user(parts), bot("a", tool_calls=calls)]})

    assert parse(line())[1].unused == ()
    for where, more in (
        ("message 2, tool call 1", "call"),
        ("message 2, tool call 1", "function"),
        ("message 1, part 1", "part"),
    ):
        with refused(where, "result", kind=formats.UnusableLine):
            parse(line(**{more: {"result": "42"}}))
        assert parse(line(**{more: {"result": "42"}}), frozenset({"result"}))[1].unused == ("result",)
        assert parse(line(**{more: {"result": None, "source": "x"}}))[1].unused == ("source",)
    assert parse(line(part={"cache_control": {"type": "ephemeral"}, "annotations": []}))[1].unused
    flat = {"name": "f", "arguments": {}, "thought": "t"}
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(flat)}]
    with refused("message 2, tool call 1", "thought", kind=formats.UnusableLine):
        parse(json.dumps({"conversations": turns}))


@pytest.mark.parametrize("name", ["weight", "loss", "loss_weight", "train", "Weight", "LOSS_MASK"])
def test_the_marks_of_answers_have_many_names(small_vocab, name):
    words = load_vocabulary(small_vocab)

    def line(first, second):
        turns = [("human", "q1", {}), ("gpt", "a1", {name: first}), ("human", "q2", {name: 0}),
                 ("gpt", "a2", {name: second})]  # fmt: skip
        return {"conversations": [{"from": who, "value": text, **more} for who, text, more in turns]}

    for no, yes in ((0, 1), (False, True), (0.0, 1.0)):
        (tokens,) = items(encoded(words, line(no, yes)))
        assert trained_texts(tokens, words) == ["a2<_end>"]
    for value in (0.5, 2, "0", [0]):
        with refused("message 2", name, "0", "1"):
            parse(json.dumps(line(value, 1)))
    whole = encoded(words, chat("q", "a", **{name: 0}), chat("q", "a", **{name: 1}), bad_lines="error")
    assert len(whole.lengths) == 1 and whole.counts["skipped"] == {formats.WEIGHT_0: 1}
    assert not any(problem.fatal for problem in whole.problems)


def test_marks_that_contradict_each_other_are_refused():
    with refused("weight 0", "loss True"):
        parse(json.dumps({"messages": [user("q"), bot("a", weight=0, loss=True)]}))


def test_an_empty_system_text_is_one_in_every_format():
    default = "<_system>你是中国电信星辰语义大模型"
    for line in (CONVERSATIONS, ALPACA, {"dialog": [user("q"), bot("a")]}):
        for system, start in (("", "<_system>\n<_user>"), ("s", "<_system>s\n<_user>"), (None, default)):
            text = conversation_text(parse_line(json.dumps(line | {"system": system})).render())
            assert text.startswith(start)
    messages = [{"role": "system", "content": ""}, user("q"), bot("a")]
    text = conversation_text(parse_line(json.dumps({"messages": messages})).render())
    assert text.startswith("<_system>\n<_user>")


def test_fields_are_counted_in_the_output_and_named_line_by_line(small_vocab, tmp_path):
    lines = [chat("q", "a", source="x", id=3), PLAIN | {"source": "y"}, PLAIN | {"context": "c"}]
    data = write_lines(tmp_path / "d.jsonl", lines)
    options = Options(max_length=200, ignore_fields="context, absent")
    result = prepare(data, small_vocab, tmp_path / "out", options)
    assert result["counts"]["unused_fields"] == {"absent": 0, "context": 1, "id": 1, "source": 2}
    assert result["options"]["ignore_fields"] == "context, absent"
    assert "1 context" in summary(result) and "2 source" in summary(result)
    lines = [PLAIN | {"title": "t"}, PLAIN, PLAIN | {"context": "c"}]
    write_lines(data, lines)
    with refused("d.jsonl, line 1", "title", "2 of 3", "d.jsonl:3 (context)"):
        prepare(data, small_vocab, tmp_path / "other", Options(max_length=200))
