"""Fixtures that several test files share."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a suite started with `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def scratch_directory(tmp_path_factory):
    """Tests run in a folder of their own: MindSpore and MindFormers write into the current directory."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("scratch"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def graph_mode_on_cpu(scratch_directory):
    """The context of a run on a CPU, where a collected test imports MindSpore: the others need not wait."""
    if "mindspore" in sys.modules:
        import mindspore

        mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU", jit_config={"jit_level": "O0"})


@pytest.fixture
def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of released tokenizers and real dialogues that lies beside the checkout."""
    folder = CHECKOUT.parent / "shared" / "data" / "telechat2"
    if not folder.is_dir():
        pytest.skip(
            f"needs the released tokenizers and dialogues in {folder}, which are not part of the project"
        )
    return folder


@pytest.fixture(scope="session")
def small_vocab(tmp_path_factory) -> Path:
    """A SentencePiece model of some 600 pieces with the released special ids 0 to 17 and byte fallback."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("small_vocab")
    sentences = [
        "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox.",
        "生抽与老抽的区别？生抽的颜色比较淡，而老抽的颜色较深。",
        "你能告诉我什么是人工智能吗？人工智能是让计算机模拟人类的思维和行为。",
        "What is the weather in Beijing today? It is sunny and warm, 25 degrees.",
        'def add(a, b):\n    """Return the sum."""\n    return a + b',
    ]
    tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece="<_unk>",
        bos_piece="<_start>",
        eos_piece="<_end>",
        pad_piece="<_pad>",
        control_symbols=["<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>", *tags]
        + [f"<_control{i}>" for i in range(5, 10)],
        user_defined_symbols=[*"0123456789_\n\t", "<reserve1>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def small_tokenizer(small_vocab):
    """The TelechatTokenizer of ``small_vocab``."""
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    return TelechatTokenizer(small_vocab)
