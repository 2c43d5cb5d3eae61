"""Encoding: TelechatTokenizer's ids; every line accounted for, whatever is in it; what is too long."""

import json

import pytest
from data_lines import bot, chat, encoded, items, trained_texts, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refused

from research.telechat2.data import formats
from research.telechat2.data.encoding import TRAINED
from research.telechat2.data.job import vocabulary_of_data
from research.telechat2.telechat_tokenizer import TelechatTokenizer
from research.telechat2.text import chat as telechat_chat
from research.telechat2.text.load_vocabulary import load_vocabulary
from research.telechat2.text.messages import ROLES


@pytest.fixture(scope="module")
def words(small_vocab):
    return load_vocabulary(small_vocab)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_115b.model"])
def test_ids_and_mask_are_those_of_the_tokenizer_of_prediction(shared_data, name):
    words, tokenizer = load_vocabulary(shared_data / name), TelechatTokenizer(shared_data / name)
    assert (words.pad_id, words.size) == (tokenizer.pad_token_id, len(tokenizer))
    lines = [line for _, line in formats.read_lines(shared_data / "demo_tool.jsonl")][:60]
    lines += [json.dumps(chat("<_end>", "▁ é 🦊", "\n▁?", "</tool_call>"))]
    found = items(encoded(words, *lines, capacity=10**6))
    for line, tokens in zip(lines, found, strict=True):
        ids, mask = telechat_chat.encode(formats.parse_line(line).render(), tokenizer.vocabulary)
        assert (tokens & ~TRAINED).tolist() == ids
        assert (tokens >= TRAINED).tolist() == [m == 1 for m in mask]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
any_text = st.text(st.characters(), max_size=12)  # surrogates included
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from([*ROLES, "robot"]), "content": any_text | json_values},
        optional={"weight": st.sampled_from([0, 1, 2]), "tool_calls": json_values},
    ),
    max_size=4,
)
objects = st.one_of(
    st.fixed_dictionaries({"messages": turns}, optional={"tools": json_values}),
    st.fixed_dictionaries({"dialog": turns}, optional={"system": any_text}),
    st.fixed_dictionaries({"input": any_text, "output": any_text}),
    st.fixed_dictionaries({"instruction": any_text, "output": any_text}, optional={"history": json_values}),
    st.fixed_dictionaries({"conversations": json_values}),
    st.fixed_dictionaries({"text": any_text}),
    st.fixed_dictionaries({"data": json_values}),
    json_values,
)
lines = st.one_of(objects.map(lambda line: json.dumps(line).encode()), st.binary(max_size=30), st.just(b" "))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.lists(lines.map(lambda line: line.replace(b"\n", b" ")), max_size=8),
    train_on=st.sampled_from(telechat_chat.TRAIN_ON),
    too_long=st.sampled_from(["skip", "truncate"]),
)
def test_every_line_is_counted_once_whatever_it_holds(words, batch, train_on, too_long):
    result = encoded(words, *batch, capacity=90, train_on=train_on, too_long=too_long)
    counts = result.counts
    used = counts["totals"]["conversations"] + counts["totals"]["texts"]
    assert counts["totals"]["lines"] == len(batch) == used + sum(counts["skipped"].values())
    assert used == len(result.lengths) == sum(counts["formats"].values()) == sum(counts["lengths"].values())
    assert {problem.reason for problem in result.problems} == set(counts["skipped"])
    found = items(result)
    assert counts["totals"]["tokens"] == sum(map(len, found))
    for tokens, length in zip(found, result.lengths, strict=True):
        assert length < 0 or length <= 90
        assert (tokens & ~TRAINED).max() < words.size
        assert (tokens[1:] >= TRAINED).any() and (tokens[0] & ~TRAINED) in words.start_ids
    json.dumps([counts, result.problems], ensure_ascii=False).encode()


def test_reasons_are_told_apart(words):
    result = encoded(
        words,
        *("  ", "{", "[1]", '{"question": "q"}', {"input": "q", "output": ""}, b'{"text": "\xff"}'),
        *(chat("q"), chat(r"a", "\ud83d"), {"text": ""}, chat("q" * 900, "a")),
    )
    assert dict(result.counts["skipped"]) == {
        "blank line": 1,
        "not JSON": 1,
        "of no known format": 2,
        "not what its format asks for": 2,
        "not UTF-8": 1,
        "without an answer to train on": 1,
        "not valid Unicode: half of a surrogate pair": 1,
        "longer than a record of 500 tokens": 1,
    }
    by_line = {problem.line: problem.sentence for problem in result.problems}
    assert by_line[5].startswith("message 2 is an empty answer")
    assert by_line[8] == "holds U+D83D, half of a surrogate pair"


DEEP = "[" * 100_000
CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    "line",
    [
        {"conversations": [{"from": "human", "value": "q"}], "tools": DEEP},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": DEEP}]},
        {"messages": [user("q"), bot(None, tool_calls=[{"name": "f", "arguments": DEEP}])]},
        *(
            json.dumps({"messages": [user("q"), bot("a")], "tools": [{"name": "f", "deep": 0}]}).replace(
                "0", "[" * depth + "]" * depth
            )
            for depth in range(600, 1000, 25)  # some of which can be read, but not written
        ),
    ],
)
def test_what_is_nested_too_deeply_is_a_bad_line(words, line):
    result = encoded(words, line, chat("q", "a"), capacity=10**6)
    assert 1 <= len(result.lengths) == 2 - sum(result.counts["skipped"].values())
    if not isinstance(line, str):
        assert dict(result.counts["skipped"]) == {"not what its format asks for": 1}


def test_what_ends_a_run_is_what_was_asked_for(words):
    batch = ("", "{", chat("q", "\ud83d"), chat("q" * 900, "a"))

    def fatal(**settings):
        return [problem.line for problem in encoded(words, *batch, **settings).problems if problem.fatal]

    assert fatal(bad_lines="error") == [2]
    assert fatal(bad_lines="skip", too_long="error") == [4]
    assert fatal(bad_lines="skip") == []


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    capacity=st.integers(5, 80),
)
def test_what_is_too_long_is_cut_at_the_last_turn_border_that_fits(words, sizes, capacity):
    messages, borders = [], []
    for question, answer, with_tool in sizes:
        messages.append(user("1" * question))
        if with_tool:
            messages += [bot("2", tool_calls=[CALL]), {"role": "tool", "content": "3"}]
        messages.append(bot("4" * answer))
        borders.append(len(messages))
    fitting = [n for n in borders if length(words, messages[:n]) <= capacity]
    result = encoded(words, {"messages": messages}, capacity=capacity, too_long="truncate")
    if not fitting:
        assert sum(result.counts["skipped"].values()) == 1 and not len(result.tokens)
        return
    (expected,) = items(encoded(words, {"messages": messages[: fitting[-1]]}, capacity=10**6))
    (found,) = items(result)
    assert found.tolist() == expected.tolist()
    assert result.counts["totals"]["truncated"] == (fitting[-1] < len(messages))


def length(words, messages) -> int:
    (tokens,) = items(encoded(words, {"messages": messages}, capacity=10**6))
    return len(tokens)


def test_a_cut_conversation_trains_its_own_last_answer(words):
    line = chat("q1", "a1", "q2", "a2" * 200)
    (tokens,) = items(encoded(words, line, train_on="last_answer", too_long="truncate", capacity=100))
    assert trained_texts(tokens, words) == ["a1<_end>"]


def test_a_line_of_ten_megabytes(words):
    content = "狐狸 jumps over 2+2\n" * 400_000
    result = encoded(words, {"text": content})
    (tokens,) = items(result)
    assert result.lengths[0] == -len(tokens) and trained_texts(tokens, words) == [content + "<_end>"]


def test_another_models_vocabulary_is_refused(tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "other")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 9), model_prefix=prefix, vocab_size=20, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    with refused("other.model", "'<_start>'", "<s>"):
        load_vocabulary(f"{prefix}.model")
    with refused("tokenizer.json", "tokenizer.model"):
        vocabulary_of_data(tmp_path / "tokenizer.json")
