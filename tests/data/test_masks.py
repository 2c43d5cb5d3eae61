"""What is trained: exactly the answers and their end tokens, or what was asked for; nothing else ever."""

import json
from pathlib import Path

import pytest
from data_lines import bot, chat, encoded, items, trained_texts, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.telechat2.data import encoding
from research.telechat2.data.encoding import TRAINED
from research.telechat2.text.load_vocabulary import load_vocabulary
from research.telechat2.text.messages import is_blank

CALL = {"function": {"name": "f", "arguments": {}}}
WITH_TOOLS = {
    "messages": [
        {"role": "system", "content": "be kind"},
        user("q1"),
        bot(None, tool_calls=[CALL, CALL]),
        {"role": "tool", "content": "r1"},
        {"role": "tool", "content": "r2"},
        bot("a1"),
        user("q2"),
        bot("a2"),
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}
SPOKEN = "\n".join(['<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'] * 2) + "<_end>"


@pytest.fixture(scope="module", params=["with tool tags", "without"])
def words(request, small_vocab, shared_data):
    if request.param == "with tool tags":
        return load_vocabulary(small_vocab)
    return load_vocabulary(shared_data / "tokenizer_115b.model")


def trained(words, line, **settings):
    (tokens,) = items(encoded(words, line, **settings))
    return trained_texts(tokens, words)


def test_answers_and_calls_are_trained(words):
    assert trained(words, WITH_TOOLS) == [SPOKEN, "a1<_end>", "a2<_end>"]


def test_the_last_answer_alone(words):
    assert trained(words, WITH_TOOLS, train_on="last_answer") == ["a2<_end>"]


def test_everything_but_system_text_and_results_of_tools(words):
    assert trained(words, WITH_TOOLS, train_on="everything") == [
        f"<_user>q1<_bot>{SPOKEN}\n",
        "<_bot>a1<_end>\n<_user>q2<_bot>a2<_end>\n",
    ]
    plain = {"input": "q1<_bot>a1<_user>q2", "output": "a2"}
    assert trained(words, plain, train_on="everything") == ["<_user>q1<_bot>a1<_end><_user>q2<_bot>a2<_end>"]


def test_results_of_tools_in_dialog_data_are_not_trained(small_vocab, shared_data):
    result = "<tool_response>\nr1\n</tool_response>"

    def line(*contents):
        roles = ("user", "bot")
        return {"dialog": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}

    tagged = load_vocabulary(small_vocab)
    data = line("q1", "a1", f"{result}\n{result}", "a2", f"q3{result}q4", "a4")
    assert trained(tagged, data, train_on="everything") == [
        "<_user>q1<_bot>a1<_end>\n",
        "<_bot>a2<_end>\n<_user>q3",
        "q4<_bot>a4<_end>\n",
    ]
    # the same as where the results are messages of their own
    called = SPOKEN.removesuffix("<_end>")
    messages = [user("q1"), bot(None, tool_calls=[CALL, CALL])]
    messages += [*[{"role": "tool", "content": "r1"}] * 2, bot("a2")]
    dialog = line("q1", called, f"{result}\n{result}", "a2")
    (written,) = items(encoded(tagged, dialog, train_on="everything"))
    (role_tool,) = items(encoded(tagged, {"messages": messages}, train_on="everything"))
    assert written.tolist() == role_tool.tolist()
    # a vocabulary without the tags encodes the whole turn as one text
    untagged = load_vocabulary(shared_data / "tokenizer_115b.model")
    assert trained(untagged, data, train_on="everything") == [
        "<_user>q1<_bot>a1<_end>\n",
        "<_bot>a2<_end>\n<_user>",
        "<_bot>a4<_end>\n",
    ]


def test_no_result_of_the_released_dialogues_is_trained(shared_data):
    words = load_vocabulary(shared_data / "tokenizer.model")
    with open(shared_data / "demo_tool.jsonl", "rb") as file:
        lines = [line for line in file if b"<tool_response>" in line][:100]
    for line in lines:
        texts = trained(words, line.strip(), train_on="everything", capacity=10**6)
        assert not any("tool_response" in text or text == "<_user>" for text in texts)
        answers = [turn["content"] for turn in json.loads(line)["dialog"] if turn["role"] == "bot"]
        assert all(answer in "".join(texts) for answer in answers)


def test_an_answer_of_weight_0_is_not_trained(words):
    line = chat("q1", "a1", "q2", "a2", "q3", "a3")
    line["messages"][2]["weight"] = 1
    line["messages"][4]["weight"] = 0
    assert trained(words, line) == ["a1<_end>", "a3<_end>"]
    assert trained(words, line, train_on="everything") == [
        "<_user>q1<_bot>a1<_end>\n<_user>q2",
        "<_user>q3<_bot>a3<_end>\n",
    ]
    line["messages"][6]["weight"] = 0
    result = encoded(words, line, train_on="last_answer")
    assert result.counts["skipped"] == {"without an answer to train on": 1}


def test_a_text_is_trained_whole_whatever_is_asked_for(words):
    for train_on in ("answers", "last_answer", "everything"):
        assert trained(words, {"text": "a fox"}, train_on=train_on) == ["a fox<_end>"]


HOSTILE = ["<_end>", "<_bot>", "<tool_call>", "<_pad>", "▁", " ", "\n", "你"]
contents = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.lists(st.sampled_from(HOSTILE), min_size=1).map("".join),
).filter(lambda text: not is_blank(text))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(contents, contents, st.sampled_from([None, 0, 1])), min_size=1, max_size=4))
def test_trained_tokens_decode_to_exactly_the_weighted_answers(small_vocab, turns):
    words = _words(small_vocab)
    messages = [m for q, a, w in turns for m in (user(q), bot(a, **({} if w is None else {"weight": w})))]
    wanted = [a + "<_end>" for _, a, weight in turns if weight != 0]
    result = encoded(words, {"messages": messages}, capacity=100_000)
    if not wanted:
        assert result.counts["skipped"] == {"without an answer to train on": 1}
        return
    (tokens,) = items(result)
    assert trained_texts(tokens, words) == wanted
    assert result.counts["totals"]["trained_tokens"] == (tokens >= TRAINED).sum()
    # special tokens come from the template alone, however the contents read
    control = [i for i in (tokens & ~TRAINED).tolist() if i in words.control_ids]
    assert control == [6, *[4, 5, 2] * len(turns)]


def _words(small_vocab, loaded={}):  # noqa: B006 (kept for the examples of a run)
    if small_vocab not in loaded:
        loaded[small_vocab] = load_vocabulary(small_vocab)
    return loaded[small_vocab]


def test_the_picture_in_the_documentation_shows_what_is_trained(small_vocab):
    """Each line of masks.svg is one choice; its green parts are what that choice trains."""
    import re
    from html import unescape

    svg = (Path(encoding.__file__).parent / "masks.svg").read_text(encoding="utf-8")
    line = json.loads(unescape(re.search(r"<desc>(.*?)</desc>", svg, re.DOTALL)[1]))
    words = _words(small_vocab)
    rows = re.findall(r'<g id="(\w+)">(.*?)</g>', svg, re.DOTALL)
    assert [name for name, _ in rows] == ["answers", "last_answer", "everything"]
    for train_on, row in rows:
        (tokens,) = items(encoded(words, line, train_on=train_on))
        spans = words.spans((tokens & ~TRAINED).tolist(), (tokens >= TRAINED).tolist())
        shown = [(unescape(t), c == "trained") for c, t in re.findall(r'class="(\w+)">(.*?)</tspan>', row)]
        assert joined(shown) == joined((span.text.replace("\n", "⏎"), span.trained) for span in spans)


def joined(parts) -> list[tuple[str, bool]]:
    """Neighbours of one colour as one."""
    result: list[tuple[str, bool]] = []
    for text, is_trained in parts:
        if result and result[-1][1] == is_trained:
            text = result.pop()[0] + text
        result.append((text, is_trained))
    return result
