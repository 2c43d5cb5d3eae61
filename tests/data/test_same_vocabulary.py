"""Data, weights and tokenizer of two vocabularies are an error; of one, however stored, they are not."""

import json
import shutil

import pytest
import sentencepiece
from refusal import refused
from sentencepiece import sentencepiece_model_pb2

from research.telechat2.data.same_vocabulary import (
    HASH_KEY,
    check_answering_vocabulary,
    check_data_vocabulary,
    check_pieces,
    data_vocabulary,
    sha256,
)


@pytest.fixture
def other_vocab(small_vocab, tmp_path):
    """``small_vocab`` with two pieces exchanged: as many, and the same markers."""
    model = sentencepiece_model_pb2.ModelProto.FromString(small_vocab.read_bytes())
    one, two = model.pieces[-1].piece, model.pieces[-2].piece
    model.pieces[-1].piece, model.pieces[-2].piece = two, one
    file = tmp_path / "other" / "tokenizer.model"
    file.parent.mkdir()
    file.write_bytes(model.SerializeToString())
    return file


@pytest.fixture
def again(small_vocab, tmp_path):
    """The same pieces in a file of other bytes."""
    model = sentencepiece_model_pb2.ModelProto.FromString(small_vocab.read_bytes())
    model.trainer_spec.model_prefix = "elsewhere"
    file = tmp_path / "again" / "tokenizer.model"
    file.parent.mkdir()
    file.write_bytes(model.SerializeToString())
    assert sha256(file) != sha256(small_vocab)
    return file


def data_of(vocab, folder, name="d.mindrecord"):
    folder.mkdir(exist_ok=True)
    manifest = {"tokenizer": {"path": str(vocab), "sha256": sha256(vocab), "vocab_size": 600}}
    (folder / f"{name}.json").write_text(json.dumps(manifest))
    return folder / name


def weights_with(vocab, folder):
    folder.mkdir()
    shutil.copyfile(vocab, folder / "tokenizer.model")
    return folder / "model.safetensors"


def test_data_made_with_another_vocabulary(small_vocab, other_vocab, again, tmp_path):
    data = data_of(small_vocab, tmp_path / "data")
    for folder in (False, True):
        weights = tmp_path / f"w{folder}"
        weights = weights_with(other_vocab, weights).parent if folder else weights_with(other_vocab, weights)
        with refused(data, small_vocab, sha256(other_vocab)[:12], sha256(small_vocab)[:12]):
            check_data_vocabulary([data], weights)
    check_data_vocabulary([data], weights_with(small_vocab, tmp_path / "same"))
    check_data_vocabulary([data], weights_with(again, tmp_path / "w3"))
    check_data_vocabulary([data], tmp_path / "no_tokenizer_beside" / "x.safetensors")
    check_data_vocabulary([data], None)
    check_data_vocabulary([tmp_path / "no_manifest.mindrecord"], tmp_path / "wTrue")
    assert data_vocabulary([tmp_path / "no.mindrecord", data]) == sha256(small_vocab)


def test_two_vocabularies_in_one_data_set(small_vocab, other_vocab, again, tmp_path):
    files = [data_of(small_vocab, tmp_path / "data", "a"), data_of(other_vocab, tmp_path / "data", "b")]
    with refused(*files, small_vocab, other_vocab):
        check_data_vocabulary(files, None)
    check_data_vocabulary([files[0], data_of(again, tmp_path / "data", "c")], None)


def test_answering_with_another_vocabulary_than_that_of_the_weights(small_vocab, other_vocab, tmp_path):
    weights = weights_with(small_vocab, tmp_path / "w")
    with refused(other_vocab, weights):
        check_answering_vocabulary(other_vocab, weights)
    check_answering_vocabulary(small_vocab, weights)
    trained = tmp_path / "out" / "checkpoint"  # as a training leaves it: the hash alone
    trained.mkdir(parents=True)
    (trained / "config.json").write_text(json.dumps({HASH_KEY: sha256(small_vocab)}))
    check_answering_vocabulary(small_vocab, trained)
    with refused(other_vocab, trained / "config.json"):
        check_answering_vocabulary(other_vocab, trained)


def test_a_llamas_vocabulary_against_its_model(small_vocab):
    size = sentencepiece.SentencePieceProcessor(model_file=str(small_vocab)).get_piece_size()
    settings = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": [2, 5]}
    for changes in ({}, {"eos_token_id": size + 3}, {"bos_token_id": None}, {"vocab_size": size + 64}):
        check_pieces(small_vocab, settings | changes)
    with refused(f"{size} pieces", f"vocab_size is {size - 1}"):
        check_pieces(small_vocab, settings | {"vocab_size": size - 1})
    with refused("eos_token_id", size - 1, 2):
        check_pieces(small_vocab, settings | {"eos_token_id": size - 1})
