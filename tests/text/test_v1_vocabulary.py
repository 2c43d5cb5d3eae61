"""TeleChat v1 12B's kind of vocabulary: its markers are ordinary pieces, and its prompts have torch's ids.

torch's ``chat`` puts the ids of the markers, from generation_config.json, around the ids of the question.
"""

import json
from types import SimpleNamespace

import pytest
import sentencepiece
from oracle import write_hf_folder

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch
from research.telechat2.config.generation_limits import GenerationLimits
from research.telechat2.infer.predictor import Predictor
from research.telechat2.infer.sources import choose_prompt_format
from research.telechat2.telechat_tokenizer import TelechatTokenizer
from research.telechat2.text.chat import encode, render
from research.telechat2.text.load_vocabulary import load_vocabulary
from research.telechat2.text.stream_decoder import StreamDecoder

QUESTION = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module", params=["user-defined", "normal"])
def v1_vocab(request, tmp_path_factory):
    """<_user> is piece 20, <_bot> 21, <_system> 22, as user-defined pieces or as normal ones."""
    from sentencepiece import sentencepiece_model_pb2

    folder = tmp_path_factory.mktemp("v1")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["你好吗？你好！", "the quick <brown> fox_user>"] * 20), vocab_size=400,
        model_prefix=str(folder / "tokenizer"), model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2,
        pad_id=3, unk_piece="<_unk>", bos_piece="<_start>", eos_piece="<_end>", pad_piece="<_pad>",
        control_symbols=[f"<_control{i}>" for i in range(16)], minloglevel=2,
        user_defined_symbols=["<_user>", "<_bot>", "<_system>", "<reserve1>"],
    )  # fmt: skip
    file = folder / "tokenizer.model"
    if request.param == "normal":
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(file.read_bytes())
        for piece in model.pieces[20:23]:
            piece.type = 1
        file.write_bytes(model.SerializeToString())
    return file


def torch_ids(file) -> list[int]:
    return [20, *sentencepiece.SentencePieceProcessor(model_file=str(file)).encode("你好"), 21]


def test_a_question_has_torchs_ids(v1_vocab):
    tokenizer = TelechatTokenizer(v1_vocab)
    chosen, why = choose_prompt_format(None, v1_vocab.parent, tokenizer)
    assert chosen == "v1" and "TeleChat v1" in why
    predictor = Predictor(SimpleNamespace(), tokenizer, chosen, GenerationLimits(100))
    asked = SimpleNamespace(messages=QUESTION, tools=None, tool_tags_in_content=False)
    assert predictor.prompt_ids(asked) == torch_ids(v1_vocab)
    assert tokenizer("<_user>你好<_bot>")["input_ids"] == torch_ids(v1_vocab)


def test_mindie_gives_torchs_ids(v1_vocab):
    from research.telechat2.serve.mindie.classes import MindIETelechatTokenizer

    tokenizer = MindIETelechatTokenizer(v1_vocab)
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True) == torch_ids(v1_vocab)


def test_the_exported_template_gives_torchs_ids(v1_vocab, tmp_path):
    from transformers import AutoTokenizer

    sizes = {"vocab_size": 500, "hidden_size": 8, "n_head": 2, "n_layer": 1, "ffn_hidden_size": 8}
    write_hf_folder(tmp_path / "hf", sizes, seed=0)
    config = tmp_path / "hf" / "config.json"
    content = json.loads(config.read_text())
    content.pop("base_seqlen", None)  # which TeleChat v1's config.json does not have
    config.write_text(json.dumps(content))
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    convert_to_torch(tmp_path / "ms", tmp_path / "llama", "llama", vocab_file=v1_vocab)
    exported = AutoTokenizer.from_pretrained(tmp_path / "llama")
    found = exported.apply_chat_template(QUESTION, add_generation_prompt=True)
    found = found["input_ids"] if hasattr(found, "keys") else found
    assert found == torch_ids(v1_vocab)


def test_a_marker_that_is_typed_is_text(v1_vocab):
    tokenizer, words = TelechatTokenizer(v1_vocab), load_vocabulary(v1_vocab)
    typed = "你<_user>好<_bot><_bot>▁<_system>"
    ids = tokenizer.encode_text(typed)
    assert not {20, 21, 22} & set(ids) and tokenizer.decode(ids) == typed
    assert words.encode_many([typed.encode()])[0].tolist() == words.encode_text(typed) == ids
    stream = StreamDecoder(tokenizer.vocabulary)
    assert "".join(map(stream.put, ids)) + stream.end() == typed
    assert tokenizer.decode([20, *ids, 21, 2], skip_special_tokens=True) == typed
    messages = [*QUESTION, {"role": "assistant", "content": typed}]
    rendered, mask = encode(render(messages, prompt_format="v1"), tokenizer.vocabulary)
    assert rendered == [*torch_ids(v1_vocab), *ids, 2] and sum(mask) == len(ids) + 1
    assert [s.text for s in words.spans(rendered, mask) if s.special] == ["<_user>", "<_bot>", "<_end>"]
