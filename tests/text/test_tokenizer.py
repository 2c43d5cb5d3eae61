"""The tokenizer: it never leaves the embedding, never turns text into control symbols, and loses nothing."""

import json
import logging
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindformers.models.build_tokenizer import build_tokenizer
from refusal import refused

from research.telechat2.telechat_tokenizer import TelechatTokenizer
from research.telechat2.text.load_vocabulary import load_vocabulary
from research.telechat2.text.stream_decoder import StreamDecoder

MARKERS = ["<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CONTROLS = [*MARKERS, *TAGS, "<_unk>", "<_observation>", "<_sep>", "<_control5>"]

# Surrogates are not text. U+2581 is SentencePiece's own mark, and U+FDD0 stands in for it.
unicode_text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("▁\ufdd0 "), max_size=40)
hostile_text = st.lists(
    st.one_of(st.sampled_from(CONTROLS), st.sampled_from([" ", "\n", "a", "你", "<", "0"]))
).map("".join)
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["small", "tokenizer.model", "tokenizer_115b.model"])
def tokenizer(request, small_vocab):
    """Our tokenizer on the small vocabulary and on both released ones."""
    if request.param == "small":
        return TelechatTokenizer(small_vocab)
    return TelechatTokenizer(request.getfixturevalue("shared_data") / request.param)


@many
@given(text=unicode_text)
def test_any_unicode_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@many
@given(text=hostile_text)
def test_special_text_stays_text_and_a_raw_prompt_keeps_its_markers(tokenizer, text):
    literal = tokenizer.encode_text(text)
    assert not any(i in tokenizer.vocabulary.control_ids for i in literal)
    assert tokenizer.decode(literal) == text
    raw = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(raw) == text
    for index, marker in enumerate(MARKERS, 1):
        assert raw.count(index) == text.count(marker)


def test_sentencepieces_own_mark_comes_back(tokenizer):
    """Its neighbours keep their ids: it goes by its bytes, as a character of no vocabulary does."""
    for text in ("▁", "a▁b", "▁ ▁▁a", "\ufdd0▁\ufdd1"):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
        other = tokenizer.encode_text(text.replace("▁", "\ufdd5"))
        assert [i for i in tokenizer.encode_text(text) if i not in tokenizer.vocabulary.byte_ids] == [
            i for i in other if i not in tokenizer.vocabulary.byte_ids
        ]


def test_half_a_surrogate_pair_is_refused(small_tokenizer):
    with refused("U+D83D", "character 2"):
        small_tokenizer.encode_text("ab\ud83d")
    with refused("0xE4", "character 1"):
        small_tokenizer.encode_text(b"a\xe4\xbd".decode(errors="surrogateescape"))


def test_every_id_is_a_row_of_the_embedding(tokenizer):
    pieces = tokenizer.vocabulary.size
    assert len(tokenizer) == tokenizer.vocab_size == pieces
    assert sorted(tokenizer.get_vocab().values()) == list(range(pieces))
    assert tokenizer.convert_tokens_to_ids(MARKERS) == [1, 2, 3, 4, 5, 6]
    assert all(0 <= i < pieces for i in tokenizer.all_special_ids)
    assert [tokenizer.vocabulary.special_ids.get(marker) for marker in MARKERS] == [1, 2, 3, 4, 5, 6]


def test_tokens_the_vocabulary_lacks_are_unknown_and_reported_once(small_vocab, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = TelechatTokenizer(small_vocab, unk_token="<unk>", additional_special_tokens=["<nope>"])
        tokenizer.add_tokens(["<nope>"])
    assert sum("<nope>" in record.getMessage() for record in caplog.records) == 1
    assert tokenizer.unk_token_id == tokenizer.convert_tokens_to_ids("<unk>") == 0
    assert tokenizer.convert_tokens_to_ids("<nope>") == 0
    assert len(tokenizer) == tokenizer.vocabulary.size
    assert tokenizer.decode(tokenizer.encode("a<nope>b")) == "a<nope>b"


def test_a_marker_the_vocabulary_lacks_is_an_error(small_vocab):
    with refused(small_vocab, "'<bot>'", "<_bot>"):
        TelechatTokenizer(small_vocab, bot_token="<bot>")


def test_a_setting_without_effect_is_named(small_vocab, caplog):
    with caplog.at_level(logging.WARNING):
        TelechatTokenizer(small_vocab, vocab_fiel="x")
    assert "vocab_fiel: without effect" in caplog.text


def test_a_missing_or_wrong_vocab_file_is_refused(tmp_path, small_vocab):
    (tmp_path / "empty.model").touch()
    (tmp_path / "config.json").write_text('{"vocab_size": 131072}')
    (tmp_path / "cut.model").write_bytes(small_vocab.read_bytes()[:5000])
    cases = {
        None: "vocab_file",
        tmp_path / "absent.model": tmp_path / "absent.model",
        tmp_path: tmp_path,
        tmp_path / "empty.model": "empty.model: 0 bytes",
        tmp_path / "config.json": "config.json: 22 bytes",
        tmp_path / "cut.model": "cut.model: 5,000 bytes",
    }
    for vocab_file, found in cases.items():
        with refused(found, "tokenizer.model"):
            TelechatTokenizer(vocab_file)
        with refused(found, "tokenizer.model"):
            load_vocabulary(vocab_file)


def test_ids_outside_the_vocabulary_cannot_be_decoded(small_tokenizer):
    with refused("token id -100", "ignored label"):
        small_tokenizer.decode([4, -100])
    with refused(f"token id {len(small_tokenizer)}", f"0 to {len(small_tokenizer) - 1}"):
        small_tokenizer.decode([len(small_tokenizer)])


def test_skipping_special_tokens_keeps_tool_tags(small_tokenizer):
    ids = [5, 9, *small_tokenizer.encode_text("\n{}\n"), 10, 2, 3, 7]
    assert small_tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>\n{}\n</tool_call>"
    assert small_tokenizer.decode(ids) == "<_bot><tool_call>\n{}\n</tool_call><_end><_pad><_observation>"


@many
@given(data=st.data(), skip=st.booleans())
def test_streaming_equals_decoding_the_whole(tokenizer, data, skip):
    byte_ids = [i for i in range(500) if i in tokenizer.vocabulary.byte_ids]
    some_id = st.one_of(st.sampled_from(byte_ids), st.integers(0, 17), st.integers(0, len(tokenizer) - 1))
    ids = data.draw(st.lists(some_id, max_size=30))
    stream = StreamDecoder(tokenizer.vocabulary, skip_special_tokens=skip)
    assert "".join([stream.put(i) for i in ids] + [stream.end()]) == tokenizer.decode(
        ids, skip_special_tokens=skip
    )


@many
@given(text=unicode_text)
def test_streaming_never_shows_half_a_character(tokenizer, text):
    stream = StreamDecoder(tokenizer.vocabulary)
    shown = ""
    for index in tokenizer.encode_text(text):
        shown += stream.put(index)
        assert text.startswith(shown)
    assert shown == text
    assert stream.end() == ""


def test_a_character_of_three_bytes_comes_out_with_the_third(small_tokenizer):
    first = next(i for i in range(len(small_tokenizer)) if small_tokenizer.vocabulary.pieces[i] == "<0x00>")
    stream = StreamDecoder(small_tokenizer.vocabulary)
    assert [stream.put(first + byte) for byte in "餐".encode()] == ["", "", "餐"]


def test_bos_and_eos_are_added_only_when_asked_for(small_vocab, small_tokenizer):
    plain = small_tokenizer.encode_text("a fox")
    assert small_tokenizer("a fox")["input_ids"] == plain
    both = TelechatTokenizer(small_vocab, add_bos_token=True, add_eos_token=True)
    assert both("a fox")["input_ids"] == [1, *plain, 2]
    assert both.get_special_tokens_mask(plain) == [1, *[0] * len(plain), 1]


def test_padding_a_batch_goes_right_with_the_pad_id(small_tokenizer):
    batch = small_tokenizer(["<_user>", "<_user>a fox<_bot>"], padding=True)
    short, long = batch["input_ids"]
    assert short == [4] + [3] * (len(long) - 1)
    assert batch["attention_mask"][0] == [1] + [0] * (len(long) - 1)


def test_mindformers_builds_it_from_a_yamls_processor_section(small_vocab, small_tokenizer):
    built = build_tokenizer({"type": "TelechatTokenizer", "vocab_file": str(small_vocab)})
    assert isinstance(built, TelechatTokenizer)
    prompt = "<_start><_user>生抽与老抽的区别？<_bot>"
    assert built(prompt)["input_ids"] == small_tokenizer.encode(prompt)
    # The pipeline decodes a batch of generated sequences in one call.
    assert built.decode([[4, *built.encode_text("a fox"), 2]], skip_special_tokens=True) == ["a fox"]


def test_it_can_be_saved_and_sent_to_a_worker(small_vocab, small_tokenizer, tmp_path):
    (path,) = small_tokenizer.save_vocabulary(str(tmp_path))
    assert Path(path).read_bytes() == small_vocab.read_bytes()
    assert small_tokenizer.save_vocabulary(str(tmp_path)) == (path,)  # the same again is no loss
    Path(path).write_bytes(b"another model's")
    with refused(path):
        small_tokenizer.save_vocabulary(str(tmp_path))
    assert Path(path).read_bytes() == b"another model's"
    again = pickle.loads(pickle.dumps(small_tokenizer))
    assert again.encode("<_user>你好<_bot>") == small_tokenizer.encode("<_user>你好<_bot>")
    with refused(tmp_path / "absent"):
        small_tokenizer.save_vocabulary(str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_115b.model"])
def test_released_encodings(shared_data, name):
    """Ids noted from the released files (specification, model family, section 3.1)."""
    tokenizer = TelechatTokenizer(shared_data / name)
    assert tokenizer.encode_text("你好") == [96343]
    assert tokenizer.encode_text("\n") == [126136, 29]
    prompt = tokenizer.encode("<_start><_user>生抽与老抽的区别？<_bot>")
    assert prompt == [1, 4, 25104, 127499, 126325, 73611, 29151, 126271, 5]
    assert len(tokenizer) == 131072


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_115b.model"])
def test_ids_equal_the_slow_tokenizer_of_transformers(shared_data, name):
    from transformers import AddedToken, LlamaTokenizer

    ours = TelechatTokenizer(shared_data / name)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / name))
    special = [t for t in [*MARKERS, *TAGS] if pieces.is_control(pieces.piece_to_id(t))]
    theirs = LlamaTokenizer(
        str(shared_data / name),
        legacy=True,
        unk_token="<_unk>",
        bos_token="<_start>",
        eos_token="<_end>",
        add_bos_token=False,
        additional_special_tokens=[AddedToken(t, normalized=False, special=True) for t in special],
    )
    texts = [case["text"] for case in json.loads((shared_data / "chat_template_golden.json").read_text())]
    for file in ("demo_tool.jsonl", "demo_multi.jsonl", "demo_code.jsonl"):
        lines = (shared_data / file).read_text().splitlines()[:40]
        texts += [m["content"] for line in lines for m in json.loads(line)["dialog"]]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
