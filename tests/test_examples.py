"""The example dialogues are what their README says, and the tokenizer recipe gives the released ids."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from research.telechat2.text import chat

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIALOGUES = EXAMPLES / "dialogues.jsonl"
README_QUESTION = "生抽与老抽的区别？"
HAN = "\u3400-\u9fff\U00020000-\U0003ffff"

# The released vocabulary with tool tokens, as its documentation lists it.
RELEASED_HEAD = [
    *("<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<_control5>", "<_control6>", "<_control7>", "<_control8>", "<_control9>"),
    *("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "_", "\n", "\t", "__", "___", "____"),
]
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # piece types of SentencePiece


def train(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLES / "train_tokenizer.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def refusal(*arguments, cwd: Path) -> str:
    """The one line that a refused run leaves on stderr."""
    done = train(*arguments, cwd=cwd)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "wrote" not in done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def model_proto(path: Path):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    return model


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [json.loads(line) for line in DIALOGUES.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def conversations(records) -> list[dict]:
    return [record for record in records if "messages" in record]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    done = train("--input", DIALOGUES, "--output_path", folder / "new" / "folder", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "new" / "folder" / "tokenizer.model"


@pytest.fixture(scope="module")
def processor(tokenizer_path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))


# ---------------------------------------------------------------------- dialogues
def contents(record: dict) -> list[str]:
    if "messages" not in record:
        return [record["input"].removeprefix("<_user>"), record["output"]]
    return [message["content"] for message in record["messages"] if message["content"] is not None]


def test_a_hundred_lines_in_two_formats_and_two_languages(records):
    assert Counter(frozenset(record) for record in records) == {
        frozenset({"messages"}): 98,
        frozenset({"messages", "tools"}): 1,
        frozenset({"input", "output"}): 1,
    }
    chinese = [record for record in records if re.search(f"[{HAN}]", "".join(contents(record)))]
    assert len(chinese) == 65


def test_turns_and_roles(conversations):
    shapes = Counter()
    with_system = 0
    for record in conversations:
        roles = [message["role"] for message in record["messages"]]
        with_system += roles[0] == "system"
        shapes[tuple(role for role in roles if role != "system")] += 1
    turn = ("user", "assistant")
    tool = ("user", "assistant", "tool", "assistant")
    assert with_system == 8
    assert set(shapes) == {turn, turn * 2, turn * 3, tool}
    assert shapes[turn * 2] + shapes[turn * 3] == 20
    assert shapes[turn * 3] == 5
    assert shapes[tool] == 1


def test_the_tool_call_fits_its_declaration(conversations):
    (record,) = (record for record in conversations if "tools" in record)
    (tool,) = record["tools"]
    _, call_message, result, _ = record["messages"]
    (call,) = call_message["tool_calls"]
    assert call_message["content"] is None
    assert call["function"]["name"] == tool["function"]["name"]
    assert sorted(call["function"]["arguments"]) == sorted(tool["function"]["parameters"]["required"])
    assert isinstance(json.loads(result["content"]), dict)


def test_answers_are_short_and_worth_reading(records):
    for record in records:
        messages = record.get("messages") or [{"role": "assistant", "content": record["output"]}]
        for message in messages:
            if message["role"] == "assistant" and message["content"] is not None:
                words = re.findall(rf"[{HAN}]|[^\W_{HAN}]+", message["content"])
                limit = 60 if re.search(f"[{HAN}]", message["content"]) else 45
                assert 8 <= len(words) <= limit, message["content"]
        assert all(text == text.strip() for text in contents(record)), record


def test_the_readme_question_has_one_answer_in_both_formats(records):
    answers = [texts[1] for texts in map(contents, records) if texts[0] == README_QUESTION]
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert [r["input"] for r in records if "input" in r] == ["<_user>" + README_QUESTION]


def test_no_two_first_questions_are_trivially_the_same(conversations):
    def essence(text: str) -> str:
        text = unicodedata.normalize("NFKC", text).casefold()
        return "".join(character for character in text if character.isalnum())

    first = [next(m["content"] for m in r["messages"] if m["role"] == "user") for r in conversations]
    assert len(set(map(essence, first))) == len(first)


def test_no_prompt_occurs_twice(records):
    prompts = Counter()
    for record in records:
        if "input" in record:
            prompts["<_start>" + record["input"] + "<_bot>"] += 1
            continue
        for number, message in enumerate(record["messages"]):
            if message["role"] == "assistant":
                before = record["messages"][:number]
                segments = chat.render(before, record.get("tools"), add_generation_prompt=True)
                prompts[chat.conversation_text(segments)] += 1
    assert len(prompts) == 100 + 20 + 5 + 1  # a second turn in 20, a third in 5, the answer after the tool
    assert set(prompts.values()) == {1}


# ---------------------------------------------------------------------- tokenizer
def test_head_of_the_vocabulary_is_the_documented_one(tokenizer_path):
    pieces = model_proto(tokenizer_path).pieces
    reserved = [f"<reserve{i}>" for i in range(1, 101)]
    byte_pieces = [f"<0x{i:02X}>" for i in range(256)]
    assert [piece.piece for piece in pieces[:390]] == RELEASED_HEAD + reserved + byte_pieces
    types = [UNKNOWN] + [CONTROL] * 17 + [USER_DEFINED] * 116 + [BYTE] * 256
    assert [piece.type for piece in pieces[:390]] == types
    assert len(pieces) == 2048


@pytest.mark.parametrize(
    ("file_name", "renamed"), [("tokenizer.model", set()), ("tokenizer_115b.model", {9, 10, 11, 12})]
)
def test_ids_types_and_settings_are_the_released_ones(shared_data, tokenizer_path, file_name, renamed):
    ours, released = model_proto(tokenizer_path), model_proto(shared_data / file_name)
    for index in range(390):
        assert ours.pieces[index].type == released.pieces[index].type
        assert (ours.pieces[index].piece != released.pieces[index].piece) == (index in renamed)
    assert ours.normalizer_spec == released.normalizer_spec
    # What differs: where and how much text was read, by how many threads, the size, names of ids 9-12.
    free = {
        "input",
        "input_format",
        "input_sentence_size",
        "model_prefix",
        "num_threads",
        "vocab_size",
        "control_symbols",
    }
    for field in released.trainer_spec.DESCRIPTOR.fields:
        if field.name not in free:
            ours_value = getattr(ours.trainer_spec, field.name)
            assert ours_value == getattr(released.trainer_spec, field.name), field.name


def test_same_dialogues_give_the_same_bytes_anywhere(tokenizer_path, tmp_path):
    (tmp_path / "copy.jsonl").write_bytes(DIALOGUES.read_bytes() + b"\n\n")
    done = train("--input", ".", "--output_path", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skipped blank lines: 2" in done.stdout
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.jsonl", "tokenizer.model"]


def test_every_dialogue_survives_the_round_trip(records, processor):
    used = set()
    for text in (text for record in records for text in contents(record)):
        ids = processor.encode(text)
        assert processor.decode(ids) == text
        used.update(ids)
    assert min(used) >= 18, "literal text gives no control symbol"
    assert used & set(range(134, 390)), "rare characters exercise the byte pieces"
    assert {29, 30} <= used, "line breaks and tabs"


def test_unseen_text_survives_the_round_trip_as_well(processor):
    text = "鑫淼焱垚 \u2585 Ωμέγα \U0001f9ff\n\t__x__ 3.14<_end>"
    assert processor.decode(processor.encode(text)) == text


def test_reported_counts_are_those_of_the_text(tmp_path):
    record = {"input": "<_user>aXb", "output": "abab\U0001f43c"}
    (tmp_path / "d.jsonl").write_text(json.dumps(record), encoding="utf-8")
    done = train("--input", "d.jsonl", "--output_path", "o", "--vocab_size", 397, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "o" / "tokenizer.model"))
    tokens = 4 + len(processor.encode("aXb")) + len(processor.encode("abab\U0001f43c"))
    assert f"1 conversations: {tokens} tokens, {tokens} in the longest" in done.stdout


# ---------------------------------------------------------------------- refusals
def test_an_existing_tokenizer_is_kept(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"mine")
    message = refusal("--input", DIALOGUES, "--output_path", tmp_path, cwd=tmp_path)
    assert "tokenizer.model" in message and "--output_path" in message
    assert (tmp_path / "tokenizer.model").read_bytes() == b"mine"


def test_output_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    message = refusal("--input", DIALOGUES, "--output_path", "file", cwd=tmp_path)
    assert str(tmp_path / "file") in message or "--output_path file" in message


def test_impossible_sizes_name_the_nearest_possible_one(tmp_path):
    def sized(size, folder):
        return ("--input", DIALOGUES, "--output_path", folder, "--vocab_size", size)

    def possible(size):
        """The other number of the error."""
        numbers = {
            int(number) for number in re.findall(r"\b\d{3,}\b", refusal(*sized(size, "a"), cwd=tmp_path))
        }
        (other,) = numbers - {size}
        return other

    largest, smallest = possible(100000), possible(500)
    assert not (tmp_path / "a").exists()
    for size in (smallest, largest):
        assert train(*sized(size, f"o{size}"), cwd=tmp_path).returncode == 0
        assert len(model_proto(tmp_path / f"o{size}" / "tokenizer.model").pieces) == size
    assert str(largest) in refusal(*sized(largest + 1, "a"), cwd=tmp_path)
    assert str(smallest) in refusal(*sized(smallest - 1, "a"), cwd=tmp_path)
    for size in (0, -1):
        assert f"--vocab_size {size} " in refusal(*sized(size, "a"), cwd=tmp_path)


GOOD_LINE = '{"input": "<_user>question", "output": "answer"}\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD_LINE + '{"input": "q"\n', "line 2"),
        (GOOD_LINE + '{"question": "q"}\n', "question"),
        (GOOD_LINE + json.dumps({"input": "<_user>q", "output": "長" * 40000}) + "\n", "120000 bytes"),
        ("", "bad.jsonl"),
    ],
    ids=["malformed json", "unknown keys", "text the trainer would skip", "empty file"],
)
def test_bad_dialogues_are_named(tmp_path, text, named):
    (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
    message = refusal("--input", "bad.jsonl", "--output_path", "o", cwd=tmp_path)
    assert "bad.jsonl" in message and named in message
    assert not (tmp_path / "o").exists()


def test_missing_input(tmp_path):
    assert "nowhere.jsonl" in refusal("--input", "nowhere.jsonl", "--output_path", "o", cwd=tmp_path)


def test_text_with_the_trainers_own_mark_is_not_skipped(tmp_path):
    record = {"input": "<_user>\u2585progress\u2585", "output": "progress progress"}
    (tmp_path / "d.jsonl").write_text(json.dumps(record), encoding="utf-8")
    done = train("--input", "d.jsonl", "--output_path", ".", "--vocab_size", 403, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "U+2585" in done.stdout, "the mark itself is reported as encoded in bytes"


# ---------------------------------------------------------------------- README
def commands(file_name: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLES / file_name).read_text(encoding="utf-8"), re.DOTALL)
    return "".join(blocks).splitlines()


def test_readmes_give_the_same_commands_and_they_work(tmp_path):
    assert commands("README.md") == commands("README_CN.md")
    for folder in ("examples", "research"):
        (tmp_path / folder).symlink_to(EXAMPLES.parent / folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands("README.md"):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PATH": path},
        )
        assert done.returncode == 0, done.stderr
    assert "很高兴见到你" in done.stdout, "the second conversation is shown"
