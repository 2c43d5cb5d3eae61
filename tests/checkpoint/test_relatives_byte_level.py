"""The byte-level vocabulary of TeleChat v1 7B in TelechatTokenizer: transformers' ids, literal text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relatives_fixtures import byte_level_tokenizer

from research.telechat2.telechat_tokenizer import TelechatTokenizer
from research.telechat2.text.stream_decoder import StreamDecoder

TEXT = st.lists(
    st.sampled_from([*" aehot dT.,01\n\t<>🐼é龘生抽老", "the", " dog", "<_end>", "<unk>", "  "])
    | st.characters(exclude_categories=["Cs"]),
    max_size=40,
).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    byte_level_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return TelechatTokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_text_has_transformers_ids_and_comes_back(ours, theirs, text):
    found = ours.encode_text(text)
    assert ours.decode(found) == text
    if not any(marker in text for marker in theirs.all_special_tokens):
        assert found == theirs(text)["input_ids"]
    assert not any(index in ours.vocabulary.control_ids for index in found)  # what is typed is never a marker


def test_a_raw_prompt_has_transformers_ids(ours, theirs):
    prompt = "<_user>生抽与老抽的区别？<_bot>the dog<_end><_user>1<_bot>"
    assert ours(prompt)["input_ids"] == theirs(prompt)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (
        theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id,
    )  # fmt: skip
    assert ours.vocab_size == len(theirs)
    assert ours.vocabulary.special_ids.get("<_system>") is None


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streaming_gives_the_text_of_all(ours, data):
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
    stream = StreamDecoder(ours.vocabulary)
    streamed = "".join(stream.put(index) for index in ids) + stream.end()
    assert streamed == ours.decode(ids, skip_special_tokens=True)


def test_it_is_saved_under_its_own_name(ours, folder, tmp_path):
    (saved,) = ours.save_vocabulary(str(tmp_path))
    assert saved == str(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings: settings["model"]["vocab"].update({"生": 9}), "not byte-level: its pieces hold 生"),
        (lambda settings: settings.pop("model"), "not a tokenizer.json of BPE"),
        (
            lambda settings: settings.update(added_tokens=settings["added_tokens"][:4]),
            "no control symbol '<_start>'",
        ),
    ],
)
def test_other_vocabularies_are_refused(folder, tmp_path, change, message):
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(settings)
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        TelechatTokenizer(tmp_path / "tokenizer.json")
