"""Train a small SentencePiece tokenizer on dialogues, with the released TeleChat2 settings and special ids.

    python examples/train_tokenizer.py --input examples/dialogues.jsonl --output_path my_tokenizer

Design: the tokenizer learns from exactly the runs of text that the model will be trained on, system prompts
and tool lists included, because the one renderer produces them; the default system prompt, which nearly every
conversation repeats, becomes a dozen tokens. Ids 0 to 389 (markers, digits, reserved pieces, bytes) are those
of the released vocabulary.
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

import argparse  # noqa: E402
import io  # noqa: E402
import re  # noqa: E402
from itertools import groupby  # noqa: E402

from research.telechat2.common.cli import run  # noqa: E402
from research.telechat2.common.errors import UsageError  # noqa: E402
from research.telechat2.common.files import atomic_write  # noqa: E402

FILE_NAME = "tokenizer.model"
DEFAULT_VOCAB_SIZE = 2048

# Ids 0-3 are named in SETTINGS; the trainer numbers these 4-17 and 18-133, then the bytes 134-389.
CONTROL_SYMBOLS = [
    *("<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *(f"<_control{i}>" for i in range(5, 10)),
]
USER_DEFINED_SYMBOLS = [*"0123456789_\n\t", "__", "___", "____", *(f"<reserve{i}>" for i in range(1, 101))]
FIXED_IDS = 4 + len(CONTROL_SYMBOLS) + len(USER_DEFINED_SYMBOLS) + 256
MAX_TEXT_BYTES = 100_000  # the released max_sentence_length, in bytes of UTF-8
TRAINER_MARK = "▅"  # U+2585 stands for "unknown" inside the trainer, which skips any text that holds it
SETTINGS = {
    "model_type": "bpe",
    "character_coverage": 0.9995,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "max_sentencepiece_length": 128,
    "max_sentence_length": MAX_TEXT_BYTES,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    **{"unk_id": 0, "unk_piece": "<_unk>", "bos_id": 1, "bos_piece": "<_start>"},
    **{"eos_id": 2, "eos_piece": "<_end>", "pad_id": 3, "pad_piece": "<_pad>"},
    "control_symbols": CONTROL_SYMBOLS,
    "user_defined_symbols": USER_DEFINED_SYMBOLS,
}


def read_conversations(path: Path) -> list[list[tuple[str, bool]]]:
    """Return each conversation as runs (text, special): a special token, or the text between two of them.

    ``path`` is what the preprocessor takes: a jsonl file, or a directory of them. Blank lines are skipped and
    counted on stdout. Raises UsageError, naming file and line, for a line that is not a conversation or has a
    text the trainer would skip, and when there is no conversation at all.
    """
    from research.telechat2.data import formats, sources

    conversations = []
    blank_lines = 0
    for file in sources.input_files(path):
        for number, line in formats.read_lines(file):
            if not line.strip():
                blank_lines += 1
                continue
            with formats.naming(file, number):
                conversations.append(_runs(formats.parse_line(line).render()))
    if blank_lines:
        print(f"skipped blank lines: {blank_lines}")
    if not conversations:
        raise UsageError(f"{path} holds no conversation; give a jsonl file with one dialogue a line")
    return conversations


def _runs(segments: list) -> list[tuple[str, bool]]:
    runs = []
    for special, group in groupby(segments, key=lambda segment: segment.special):
        texts = [segment.text for segment in group]
        runs += [(text, True) for text in texts] if special else [("".join(texts), False)]
    longest = max(len(text.encode()) for text, _ in runs)
    if longest > MAX_TEXT_BYTES:
        raise UsageError(
            f"a text has {longest} bytes, but SentencePiece takes at most {MAX_TEXT_BYTES}; "
            f"split the conversation or leave it out"
        )
    return runs


def train(texts: list[str], vocab_size: int) -> bytes:
    """Return the serialised BPE model of ``vocab_size`` pieces, the same bytes for the same texts.

    Raises UsageError when the texts do not allow that many pieces, or need more.
    """
    import sentencepiece

    model = io.BytesIO()
    parts = [part for text in texts for part in text.split(TRAINER_MARK) if part]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts),
            model_writer=model,  # no path is stored: the same texts give the same bytes
            vocab_size=max(vocab_size, FIXED_IDS),  # from there on the trainer says what it needs
            num_threads=1,
            minloglevel=2,
            **SETTINGS,
        )
    except RuntimeError as error:
        raise _size_error(vocab_size, str(error)) from error
    return model.getvalue()


def _size_error(vocab_size: int, message: str) -> Exception:
    """Return what the trainer says about the size as a sentence; anything else it says is no size error."""
    if largest := re.search(r"size too high .* value <= (\d+)", message):
        return UsageError(
            f"--vocab_size {vocab_size} is more than these dialogues hold: the largest possible size is "
            f"{largest[1]}; choose at most that, or give more dialogues"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UsageError(
            f"--vocab_size {vocab_size} is too small: special tokens, bytes and the characters of these "
            f"dialogues take {smallest[1]} already; choose at least that"
        )
    return RuntimeError(f"SentencePiece could not train: {message}")


def write(model: bytes, directory: Path) -> Path:
    """Write ``directory/tokenizer.model`` atomically and return its path; UsageError if it exists."""
    path = directory / FILE_NAME
    _refuse_existing(path)
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model)
    return path


def _refuse_existing(path: Path) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise UsageError(f"--output_path {path.parent} is a file; give the folder to receive {FILE_NAME}")
    if path.exists():
        raise UsageError(
            f"{path} exists and is not overwritten, since data and checkpoints may depend on it; "
            f"give another --output_path, or delete it"
        )


def summary(model: bytes, conversations: list[list[tuple[str, bool]]]) -> str:
    """Say what the tokenizer holds, how many tokens the dialogues take, and which characters are bytes."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    lengths = [
        sum(1 if special else len(processor.encode(text)) for text, special in runs) for runs in conversations
    ]
    characters = {c for runs in conversations for text, special in runs if not special for c in text} - {" "}
    as_bytes = sorted(c for c in characters if processor.piece_to_id(c) == processor.unk_id())
    names = [f"{c} U+{ord(c):04X}" if c.isprintable() else f"U+{ord(c):04X}" for c in as_bytes]
    return (
        f"{processor.vocab_size()} pieces\n"
        f"{len(conversations)} conversations: {sum(lengths)} tokens, {max(lengths)} in the longest\n"
        f"{len(characters)} different characters, encoded as bytes: {', '.join(names) or 'none'}"
    )


def main() -> None:
    """Parse the command line, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input", type=Path, required=True, help="jsonl file of dialogues, or a directory of such"
    )
    parser.add_argument("--output_path", type=Path, required=True, help=f"folder that receives {FILE_NAME}")
    parser.add_argument("--vocab_size", type=int, default=DEFAULT_VOCAB_SIZE, help="default: %(default)s")
    args = parser.parse_args()
    _refuse_existing(args.output_path / FILE_NAME)
    conversations = read_conversations(args.input)
    texts = [text for runs in conversations for text, special in runs if not special]
    model = train(texts, args.vocab_size)
    print(f"wrote {write(model, args.output_path)}: {summary(model, conversations)}")


if __name__ == "__main__":
    run(main)
