"""Nothing in a line changes silently: numbers, keys, characters, blanks, the order of turns."""

import json

import pytest
from data_lines import bot, chat, encoded, items, trained_texts, user
from refusal import refused

from research.telechat2.data import formats
from research.telechat2.data.formats import parse, parse_line
from research.telechat2.text.chat import conversation_text, render
from research.telechat2.text.load_vocabulary import load_vocabulary
from research.telechat2.text.messages import is_blank, out_of_turn

NUMBERS = (
    "1e400",
    "-0",
    "0.10",
    "1E5",
    "3.14159265358979323846264338327950288",
    "123456789012345678901234567890",
)


@pytest.fixture(scope="module")
def words(small_vocab):
    return load_vocabulary(small_vocab)


def calling(arguments: str) -> str:
    """A line whose tool call has these arguments, as they stand."""
    line = {"messages": [user("q"), bot(None, tool_calls=[{"name": "f", "arguments": "HERE"}])]}
    return json.dumps(line).replace('"HERE"', arguments)


@pytest.mark.parametrize("number", [*NUMBERS, "7" * 5000])
def test_numbers_of_tools_keep_their_digits(number):
    for arguments in (f'{{"n": [{number}]}}', json.dumps(f'{{"n":[{number}]}}')):
        assert f'{{"n": [{number}]}}}}\n</tool_call>' in conversation_text(
            parse_line(calling(arguments)).render()
        )
    tools = [{"name": "f", "parameters": {"maximum": "HERE"}}]
    line = json.dumps(chat("q", "a", tools=tools)).replace('"HERE"', number)
    assert f'"maximum": {number}}}' in conversation_text(parse_line(line).render())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_json_does_not_have_is_refused_in_tools(number):
    for arguments in (f'{{"n": {number}}}', json.dumps(f'{{"n": {number}}}')):
        with refused("message 2", "'f'", number):
            parse_line(calling(arguments)).render()
    with refused("tool 1", "'f'", "NaN"):
        render([user("q")], [{"name": "f", "x": float("nan")}])


def test_a_key_that_stands_twice_is_refused():
    for line, key in (
        ('{"input": "q", "output": "a", "output": "b"}', "output"),
        ('{"text": "a", "meta": {"k": 1, "k": 1}}', "k"),
    ):
        with refused(f"{key!r}", 2, kind=formats.UnusableLine):
            parse(line)
    with refused("message 2", "'f'", "'x'", 2):
        parse_line(calling(json.dumps('{"x": 1, "x": 2}'))).render()


BLANKS = ["", " ", "\t\n", "\u3000", "\u200b", "\ufeff", "\u00a0\u2028", "\u2800\u3164"]


@pytest.mark.parametrize("blank", BLANKS)
def test_blank_questions_answers_and_texts_are_refused(words, blank):
    assert is_blank(blank) and not is_blank(f"{blank}.{blank}")
    lines = [
        *(chat("q", blank), chat(blank, "a"), {"text": blank}, {"input": "q", "output": blank}),
        *({"instruction": blank, "output": "a"}, {"dialog": [user("q"), bot(blank)]}),
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": blank}]},
    ]
    result = encoded(words, *lines)
    assert not len(result.lengths) and sum(result.counts["skipped"].values()) == len(lines)
    assert (
        len(
            encoded(
                words,
                chat("q", f"{blank}a"),
                {"messages": [user("q"), bot("a"), user("q"), bot(blank, weight=0)]},
            ).lengths
        )
        == 2
    )


ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x00g\u200bh\ufeffi▁j\ufdd0k\r\nl\u0301ﬁＡ ① "


def test_odd_characters_come_back_in_every_format(words):
    lines = [
        chat(ODD, ODD),
        {"text": ODD},
        {"input": ODD, "output": ODD},
        {"instruction": ODD, "output": ODD},
    ]
    lines += [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    for tokens in items(encoded(words, *lines)):
        assert trained_texts(tokens, words) == [f"{ODD}<_end>"]


def test_text_that_a_vocabulary_changes_is_counted(tmp_path, words):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the fox, 你好"] * 30), model_prefix=str(tmp_path / "nfkc"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        unk_piece="<_unk>", bos_piece="<_start>", eos_piece="<_end>", pad_piece="<_pad>",
        control_symbols=["<_user>", "<_bot>", "<_system>"], minloglevel=2,
    )  # fmt: skip
    nfkc = load_vocabulary(tmp_path / "nfkc.model")
    lines = [{"text": text} for text in ("the fox", "Ａ", "two  blanks")]
    assert encoded(nfkc, *lines).counts["totals"]["changed_text"] == 2
    assert encoded(words, *lines).counts["totals"]["changed_text"] == 0


def test_turns_that_do_not_alternate_are_counted(words):
    twice = [user("q"), user("q"), bot("a")]
    greeting = [bot("hello"), user("q"), bot("a")]
    called = [user("q"), bot(None, tool_calls=[CALL]), {"role": "tool", "content": "r"}, bot("a"), user("q")]
    assert [out_of_turn(messages) for messages in (twice, greeting, called)] == [1, 1, 0]
    result = encoded(words, *({"messages": messages} for messages in (twice, greeting, called)))
    assert (len(result.lengths), result.counts["totals"]["out_of_turn"]) == (3, 2)


CALL = {"id": "1", "function": {"name": "f", "arguments": {}}}
OTHER = {"id": "2", "function": {"name": "g", "arguments": {}}}


def result(**more):
    return {"role": "tool", "content": "r", **more}


def test_an_answer_to_no_question_is_not_trained():
    messages = [user("q"), bot("a"), bot("b"), user("q"), bot("c")]
    with refused("message 3", "'assistant'", '"weight": 0'):
        render(messages)
    messages[2] = bot("b", weight=0)
    render(messages)
    render([user("q"), bot("a"), bot("b"), user("q")], add_generation_prompt=True)  # nothing is trained


def test_a_result_needs_a_call_that_waits_for_one():
    start = [user("q"), bot("a", tool_calls=[CALL, OTHER])]
    for results in ([result()], [result(), result()], [result(tool_call_id="2"), result(tool_call_id="1")]):
        render([*start, *results, bot("b")])
    for wrong, *found in (
        ([*start, result(), result(), result()], "message 5"),
        ([user("q"), bot("a"), result()], "message 3"),
        ([*start, result(tool_call_id="3")], "message 3", "'3'", "'1', '2'"),
        ([*start, result(tool_call_id="1"), result(tool_call_id="1")], "message 4", "'1'", "'2'"),
        ([*start, result(), user("q"), bot("a"), result()], "message 6"),
    ):
        with refused(*found):
            render([*wrong, bot("b")])


def test_the_older_readmes_conversations_stand_in_the_input_alone():
    line = json.dumps({"input": "<_user>q1<_bot>a1<_end><_user>q2<_bot>a2<_end>"})
    parsed = parse_line(line)
    assert conversation_text(parsed.render()) == "<_start><_user>q1<_bot>a1<_end><_user>q2<_bot>a2<_end>"
    with refused("output"):
        parse_line('{"input": "<_user>q<_bot>a<_end><_user>q2<_bot>"}')


LONG = "狐狸" * 100


@pytest.mark.parametrize(
    "messages",
    [
        [user("q"), bot("a", weight=0), user(LONG), bot("b")],
        [bot("hello"), user(LONG), bot("b")],
        [user(LONG), bot("b"), user("q"), bot("a")],
        [user("q"), bot(None, tool_calls=[CALL]), result(content=LONG), bot("b")],
    ],
)
def test_a_conversation_of_which_no_trained_answer_fits_is_too_long(words, messages):
    found = encoded(words, {"messages": messages}, capacity=60, too_long="truncate", bad_lines="error")
    assert not len(found.lengths) and not any(problem.fatal for problem in found.problems)
    assert [reason.split(" tokens")[0] for reason in found.counts["skipped"]] == [
        "longer than a record of 60"
    ]


def test_all_formats_are_cut_at_the_same_places(words):
    tagged = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    messages = [
        user("q1"),
        bot("a1"),
        user("q2"),
        bot(None, tool_calls=[CALL]),
        result(),
        bot(LONG),
        user("q3"),
        bot("a3"),
    ]
    dialog = [
        *(user("q1"), bot("a1"), user("q2"), bot(tagged), user("<tool_response>\nr\n</tool_response>")),
        *(bot(LONG), user("q3"), bot("a3")),
    ]
    turns = [
        *(
            ("human", "q1"),
            ("gpt", "a1"),
            ("human", "q2"),
            ("function_call", '{"name": "f", "arguments": {}}'),
        ),
        *(("observation", "r"), ("gpt", LONG), ("human", "q3"), ("gpt", "a3")),
    ]
    lines = [
        {"messages": messages},
        {"dialog": dialog},
        {"conversations": [{"from": who, "value": text} for who, text in turns]},
    ]
    capacity = 150
    found = items(encoded(words, *lines, capacity=capacity, too_long="truncate"))
    assert [trained_texts(tokens, words) for tokens in found] == [["a1<_end>"]] * 3
    assert found[0].tolist() == found[1].tolist() == found[2].tolist()
