"""The tokenizer of an exported folder gives AutoTokenizer the ids of ours, and the text of our renderer."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import write_hf_folder
from refusal import refused
from relatives_fixtures import byte_level_tokenizer, v1_folder

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.text.chat import TOOL_TAGS, conversation_text, encode, render

CHECKOUT = Path(__file__).resolve().parents[2]
MARKERS = ("<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>", *TOOL_TAGS)


def export(folder: Path, vocab_file: Path, prompt_format: str | None = None):
    """AutoTokenizer on the export of a model with this vocabulary."""
    from transformers import AutoTokenizer

    sizes = {"vocab_size": 131072 if vocab_file.stat().st_size > 1e6 else 600, "hidden_size": 8, "n_head": 2}
    write_hf_folder(folder / "hf", sizes | {"n_layer": 1, "ffn_hidden_size": 8}, seed=0)
    if prompt_format:
        (folder / "hf" / "prompt_format.json").write_text(json.dumps({"prompt_format": prompt_format}))
    convert_to_mindspore(folder / "hf", folder / "ms")
    convert_to_torch(folder / "ms", folder / "llama", "llama", vocab_file=vocab_file)
    return AutoTokenizer.from_pretrained(folder / "llama")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, small_vocab):
    return export(tmp_path_factory.mktemp("exported"), small_vocab)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


TEXT = st.lists(
    st.sampled_from([*"aehot dT.,0123\n\t_<>/🐼é龘生抽老的吗？▁", "__", "<reserve1>", "<_sep>", "  "])
    | st.characters(exclude_categories=["Cs"]),
    max_size=60,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_any_text_has_the_ids_of_sentencepiece_and_comes_back(exported, small_tokenizer, text):
    # tokenizer.json cannot tell U+2581 from the blank that it stands for
    text = text.replace("▁", "")
    if any(marker in text for marker in MARKERS):
        return
    expected = small_tokenizer.encode_text(text)
    assert ids(exported, text) == expected
    assert exported.decode(expected) == small_tokenizer.decode(expected)


def test_examples_as_conversations(exported, small_tokenizer):
    """The template's text, and its ids where no message holds a marker."""
    compared = 0
    for line in (CHECKOUT / "examples" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "messages" not in record:
            continue
        segments = render(record["messages"], record.get("tools"))
        templated = exported.apply_chat_template(
            record["messages"], tools=record.get("tools") or None, return_dict=True
        )
        assert exported.apply_chat_template(
            record["messages"], tools=record.get("tools") or None, tokenize=False
        ) == conversation_text(segments)
        if not any(m in (s.text or "") for s in segments for m in MARKERS if not s.special):
            assert templated["input_ids"] == encode(segments, small_tokenizer.vocabulary)[0]
            assert templated.keys() == {"input_ids", "attention_mask"}
            compared += 1
    assert compared > 50


def test_special_tokens_are_the_vocabularys(exported):
    named = (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id, exported.unk_token)
    assert named == (1, 2, 3, None)
    assert ids(exported, "<_user>a<_end><tool_call>") == [4, *ids(exported, "a"), 2, 9]
    assert exported.decode([4, *ids(exported, "a"), 9, 2], skip_special_tokens=True).split() == [
        "a<tool_call>"
    ]
    assert len(exported) == exported.vocab_size == 600


CONVERSATION = [
    {"role": "user", "content": "生抽与老抽的区别？"},
    {"role": "assistant", "content": "颜色"},
    {"role": "user", "content": "dog"},
]


def test_the_plain_format_is_exported_for_models_tuned_in_it(tmp_path, small_vocab):
    tokenizer = export(tmp_path, small_vocab, "plain")
    text = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    expected = conversation_text(render(CONVERSATION, prompt_format="plain", add_generation_prompt=True))
    assert text == expected == "<_start><_user>生抽与老抽的区别？<_bot>颜色<_end><_user>dog<_bot>"
    for empty in ("", [], [{"type": "text", "text": ""}]):  # says nothing, as for the renderer
        turns = [{"role": "system", "content": empty}, *CONVERSATION]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text == expected
        assert text == conversation_text(render(turns, prompt_format="plain", add_generation_prompt=True))
    with pytest.raises(Exception, match="no place for role system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    recorded = json.loads((tmp_path / "llama" / "prompt_format.json").read_text())
    assert recorded == {"prompt_format": "plain"}


def test_a_template_refuses_a_late_system_message(exported):
    with pytest.raises(Exception, match="role system, which cannot stand there"):
        exported.apply_chat_template([*CONVERSATION, {"role": "system", "content": "x"}], tokenize=False)


def calling(arguments) -> list[dict]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [*CONVERSATION, {"role": "assistant", "content": None, "tool_calls": [call]}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\/\b\n\t\x01\x7f,: 🦊'))


@settings(max_examples=150, deadline=None)
@given(arguments=st.dictionaries(CHARACTERS, JSON | CHARACTERS, max_size=4), data=st.data())
def test_arguments_as_text_are_rendered_as_the_renderer_does(exported, arguments, data):
    """In any spelling that JSON allows: blanks, line ends, escapes."""
    text = json.dumps(
        arguments,
        ensure_ascii=data.draw(st.booleans()),
        indent=data.draw(st.sampled_from([None, 1, "\t"])),
        separators=data.draw(st.sampled_from([None, (",", ":"), (" , ", "\r\n:")])),
    ).replace("/", data.draw(st.sampled_from(["/", "\\/"])))
    for given_as in (text, arguments):
        assert exported.apply_chat_template(calling(given_as), tokenize=False) == conversation_text(
            render(calling(given_as))
        )


@pytest.mark.parametrize(
    "arguments", ['{"n": 1e400}', ' {"n":-0, "m" : 0.10}', '{"x": 1E5, "y": ' + "9" * 5000 + "}"]
)
def test_digits_of_arguments_are_kept(exported, arguments):
    text = exported.apply_chat_template(calling(arguments), tokenize=False)
    assert text == conversation_text(render(calling(arguments)))
    for digits in ("1e400", "-0", "0.10", "1E5", "9" * 5000):
        assert (digits in text) == (digits in arguments)


@pytest.mark.parametrize("arguments", ["[1]", "", "x", None, 3])
def test_arguments_that_are_no_object_are_refused_by_both(exported, arguments):
    with refused("weather"):
        render(calling(arguments))
    with pytest.raises(Exception, match="weather are no object"):
        exported.apply_chat_template(calling(arguments), tokenize=False)


EMPTY = {"annotations": [], "refusal": None, "audio": None, "function_call": None, "tool_calls": []}
ECHOED = [
    {"role": "system", "content": [{"type": "text", "text": "s"}]},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
    {"role": "assistant", "content": "c", **EMPTY},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "", **EMPTY, "tool_calls": None},
    {"role": "assistant", "content": None, **EMPTY},
    {"role": "user", "content": " "},
    {"role": "assistant", "content": [{"type": "text", "text": "I ask"}], "tool_calls": [
        {"id": "1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a":1}'}},
    ], "reasoning_content": ""},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "r"}]},
    {"role": "user", "content": []},
]  # fmt: skip


@pytest.mark.parametrize("end", range(2, len(ECHOED) + 1))
def test_what_clients_send_back_is_rendered_as_the_renderer_does(exported, small_vocab, small_tokenizer, end):
    from research.telechat2.serve.mindie.classes import MindIETelechatTokenizer

    messages = ECHOED[:end]
    segments = render(messages, add_generation_prompt=True)
    expected = conversation_text(segments)
    assert expected.startswith("<_system>s\n<_user>ab") and expected.endswith("<_bot>")
    assert exported.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected
    served = MindIETelechatTokenizer(small_vocab).apply_chat_template(messages, add_generation_prompt=True)
    assert served == encode(segments, small_tokenizer.vocabulary)[0]


def test_parts_that_are_no_text_are_refused_by_both(exported):
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, "a", {"text": "a"}):
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
        with refused("message 1", "part 2"):
            render(messages, add_generation_prompt=True)
        with pytest.raises(Exception, match="part 2 of a content is no text"):
            exported.apply_chat_template(messages, tokenize=False)


def test_published_conversations(exported, shared_data):
    golden = json.loads((shared_data / "chat_template_golden.json").read_text(encoding="utf-8"))
    for case in golden:
        text = exported.apply_chat_template(
            case["messages"],
            tools=case["tools"],
            add_generation_prompt=case["add_generation_prompt"],
            tokenize=False,
        )
        assert text == case["text"], case["name"]


@pytest.mark.slow  # 131,072 pieces, and all real dialogues
@pytest.mark.parametrize("model", ["tokenizer.model", "tokenizer_115b.model"])
def test_released_vocabularies_on_real_dialogues(tmp_path, shared_data, model):
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    tokenizer = export(tmp_path, shared_data / model)
    ours = TelechatTokenizer(shared_data / model)
    texts = []
    for file in sorted(shared_data.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            texts += [turn["content"] for turn in record.get("dialog", [])]
            texts += [record[key] for key in ("system", "text", "input", "output") if record.get(key)]
    plain = [text for text in texts if not any(marker in text for marker in (*MARKERS, "▁"))]
    assert len(plain) > 5000
    for text in plain:
        expected = ours.encode_text(text)
        assert ids(tokenizer, text) == expected
        assert tokenizer.decode(expected) == ours.decode(expected)


def test_the_byte_level_tokenizer_of_v1_goes_along_and_gets_a_template(tmp_path):
    from transformers import AutoTokenizer

    v1_folder(tmp_path, {"hidden_size": 8, "n_head": 2, "vocab_size": 320}, seed=0, tied=True, prefix=False)
    byte_level_tokenizer(tmp_path / "v1")
    convert_to_mindspore(tmp_path / "v1", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "back")
    convert_to_torch(tmp_path / "ms", tmp_path / "llama", "llama")
    for folder in ("ms", "back", "llama"):
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == (
            tmp_path / "v1" / "tokenizer.json"
        ).read_bytes()
    settings = (tmp_path / "v1" / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer_config.json").read_bytes() == settings
    original, exported = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("v1", "llama"))
    text = "<_user>生抽与老抽的区别？<_bot>颜色<_end><_user>dog<_bot>"
    found = exported.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert found == original(text)["input_ids"] and found[0] == original.convert_tokens_to_ids("<_user>")
    assert exported.decode(found) == text
