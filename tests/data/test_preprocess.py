"""Preprocessing: records read back with MindSpore equal what SentencePiece alone gives; none is lost."""

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_lines import read
from refusal import refused

from research.telechat2.common.errors import UsageError
from research.telechat2.data import preparing, writing
from research.telechat2.data.html_report import summary
from research.telechat2.data.job import Options
from research.telechat2.data.preparing import prepare
from research.telechat2.run.dataset import check_dataset
from research.telechat2.text import prompt_format

CHECKOUT = Path(__file__).resolve().parents[2]
COMMAND = CHECKOUT / "research" / "telechat2" / "telechat_preprocess.py"
ANSWER, SYSTEM = "the fox jumps", "dog"


def write_lines(path, *lines):
    text = "".join(
        (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines
    )
    path.write_text(text, encoding="utf-8")
    return path


def plain(question="q", answer=ANSWER):
    return {"input": question, "output": answer}


def chat(question="q", answer=ANSWER):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def answers_in(records, tokenizer):
    """Decoded runs of trained tokens; a run ends with `<_end>`."""
    found = Counter()
    for _, labels in records:
        run = []
        for label in labels.tolist():
            if label != -100:
                run.append(label)
            if label == 2:
                found[tokenizer.decode(run)] += 1
                run = []
        assert not run, "a trained run without its <_end>"
    return found


def test_records_equal_an_expectation_from_sentencepiece_alone(small_vocab, tmp_path):
    encode = sentencepiece.SentencePieceProcessor(model_file=str(small_vocab)).encode
    lines = [
        plain("<_user>the fox<_bot>a dog<_user>生抽", "老抽"),
        {
            "system": "dog\n",
            "dialog": [{"role": "user", "content": "fox"}, {"role": "bot", "content": "today"}],
        },
    ]
    conversations = [
        (
            [1, 4, *encode("the fox"), 5, *encode("a dog"), 2, 4, *encode("生抽"), 5, *encode("老抽"), 2],
            [*[-100] * (3 + len(encode("the fox"))), *encode("a dog"), 2]
            + [*[-100] * (2 + len(encode("生抽"))), *encode("老抽"), 2],
        ),
        (
            [6, *encode("dog\n"), 4, *encode("fox"), 5, *encode("today"), 2, *encode("\n")],
            [
                *[-100] * (3 + len(encode("dog\n")) + len(encode("fox"))),
                *encode("today"),
                2,
                *[-100] * len(encode("\n")),
            ],
        ),
    ]
    data = write_lines(tmp_path / "data.jsonl", *lines)
    result = prepare(data, small_vocab, tmp_path / "out", Options(max_length=99, seed=0))
    ((input_ids, labels),) = read(tmp_path / "out" / "dataset.mindrecord")
    assert input_ids.dtype == labels.dtype == np.int32
    assert input_ids.shape == labels.shape == (100,)
    orders = [conversations, conversations[::-1]]
    padding = 100 - sum(len(ids) for ids, _ in conversations)
    expected = [
        (sum((c[0] for c in order), []) + [3] * padding, sum((c[1] for c in order), []) + [-100] * padding)
        for order in orders
    ]
    assert (input_ids.tolist(), labels.tolist()) in expected
    assert result["counts"]["padding_tokens"] == padding
    assert result["counts"]["trained_tokens"] == sum(label != -100 for label in labels.tolist())


def test_counts_add_up_and_say_what_was_skipped(small_vocab, small_tokenizer, tmp_path):
    data = write_lines(
        tmp_path / "d.jsonl", plain(), "", plain(answer="ab cd " * 400), chat(), plain("<_end>")
    )
    result = prepare(data, small_vocab, tmp_path / "x.mindrecord", Options(max_length=300, seed=1))
    counts = result["counts"]
    assert counts["lines"] == 5 == counts["conversations"] + sum(counts["skipped"].values())
    assert counts["skipped"] == {"blank line": 1, "longer than a record of 301 tokens": 1}
    records = read(tmp_path / "x.mindrecord")
    assert counts["tokens"] + counts["padding_tokens"] == sum(len(ids) for ids, _ in records)
    assert answers_in(records, small_tokenizer) == {f"{ANSWER}<_end>": 3}
    text = summary(result)
    assert "read 5 lines = 3 conversations written + 2 skipped" in text
    assert "skipped 1: longer than a record of 301 tokens (first: d.jsonl:3)" in text
    assert counts["skipped_lines"]["blank line"] == ["d.jsonl:2"]
    assert "1 chat, 2 plain; recorded as plain" in text
    assert "1 with special-token text" in text
    assert f"{counts['trained_tokens']:,} of them trained" in text


def test_a_conversation_as_long_as_a_record_is_kept_and_one_longer_is_not(
    small_vocab, small_tokenizer, tmp_path
):
    length = len(small_tokenizer.encode("<_start><_user>q<_bot>" + ANSWER + "<_end>"))
    data = write_lines(tmp_path / "d.jsonl", plain())
    result = prepare(data, small_vocab, tmp_path / "fits", Options(max_length=length - 1, seed=0))
    assert result["counts"]["padding_tokens"] == 0
    with refused(data, f"1 longer than a record of {length - 1} tokens"):
        prepare(data, small_vocab, tmp_path / "short", Options(max_length=length - 2, seed=0))
    assert not (tmp_path / "short").exists()


def test_the_seed_decides_the_order(small_vocab, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", *[plain(f"{i} fox") for i in range(40)])
    ids = [
        np.stack(
            [r[0] for r in read(prepare(data, small_vocab, tmp_path / str(n), Options(63, seed))["output"])]
        ).tolist()
        for n, seed in enumerate((1, 1, 2))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_the_manifest_records_inputs_tokenizer_and_format(small_vocab, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", chat())
    prepare(data, small_vocab, tmp_path / "out", Options(max_length=200, seed=5))
    manifest = json.loads((tmp_path / "out" / "dataset.mindrecord.json").read_text())
    assert prompt_format.of_dataset(tmp_path / "out") == "chat"
    assert (manifest["max_length"], manifest["seed"]) == (200, 5)
    for entry, file in ((manifest["inputs"][0], data), (manifest["tokenizer"], small_vocab)):
        expected = subprocess.run(["sha256sum", file], capture_output=True, text=True).stdout.split()[0]
        assert entry["sha256"] == expected
    # MindFormers takes every file of the folder that this pattern fits.
    assert [p.name for p in (tmp_path / "out").iterdir() if re.findall(r"mindrecord\d*$", p.name)] == [
        "dataset.mindrecord"
    ]


def test_numbered_files_are_a_data_set_that_training_takes(small_vocab, small_tokenizer, tmp_path, capsys):
    lines = [plain(f"{i} fox", f"{i} dog") for i in range(40)]
    options = Options(max_length=40, records_per_file=3)
    result = prepare(write_lines(tmp_path / "d.jsonl", *lines), small_vocab, tmp_path / "out", options)
    files = sorted((tmp_path / "out").glob("*.mindrecord"))
    assert [f["name"] for f in result["files"]] == [file.name for file in files] and len(files) > 2
    assert [f["records"] for f in result["files"]][:-1] == [3] * (len(files) - 1)
    records = [record for file in files for record in read(file)]
    assert len(records) == result["counts"]["records"]
    assert answers_in(records, small_tokenizer) == {f"{i} dog<_end>": 1 for i in range(40)}
    loader = {"type": "MindDataset", "dataset_dir": str(tmp_path / "out")}
    config = {"train_dataset": {"data_loader": loader}}
    config["model"] = {"model_config": {"seq_length": 40, "vocab_size": len(small_tokenizer)}}
    check_dataset(config, "train")
    assert "without manifest" not in capsys.readouterr().out
    most = max(list(ids).count(1) for ids, _ in records)  # <_start>, the plain format's first
    assert most > 1 and result["documents_per_record"] == most
    config["model"]["model_config"] |= {"document_start_ids": [1, 6], "max_documents": most - 1}
    with refused(f"{most} documents"):
        check_dataset(config, "train")
    config["model"]["model_config"]["vocab_size"] -= 1  # of which the records use few: the manifests tell
    with refused("vocabulary", "vocab_size"):
        check_dataset(config, "train")
    assert prompt_format.of_dataset(tmp_path / "out") == "plain"


def test_many_records_are_numbered_unasked(small_vocab, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "FILE_BYTES", 41 * 8 * 2)
    data = write_lines(tmp_path / "d.jsonl", *[plain(f"{i} fox") for i in range(12)])
    result = prepare(data, small_vocab, tmp_path / "out", Options(max_length=40))
    assert [f["records"] for f in result["files"]][0] == 2 and len(result["files"]) > 1
    assert result["output"] == str(tmp_path / "out")
    with refused("dataset.mindrecord.json", "--output_path"):
        prepare(data, small_vocab, tmp_path / "out", Options(max_length=40))


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"max_length": 1}, ["max_length", 1, 2]),
        ({"seed": -1}, ["seed", -1, 0]),
        ({"records_per_file": 0}, ["records_per_file", 0, 1]),
        ({"train_on": "all"}, ["train_on", "'all'", "answers", "last_answer", "everything"]),
        ({"too_long": "cut"}, ["too_long", "'cut'", "skip", "truncate", "error"]),
        ({"bad_lines": "keep"}, ["bad_lines", "'keep'", "error", "skip"]),
    ],
)
def test_options_are_checked(small_vocab, tmp_path, options, values):
    data = write_lines(tmp_path / "d.jsonl", plain())
    with refused(*values):
        prepare(data, small_vocab, tmp_path / "out", Options(**options))
    with refused("workers", 0):
        prepare(data, small_vocab, tmp_path / "out", Options(), workers=0)
    assert not (tmp_path / "out").exists()


def test_too_long_is_skipped_cut_or_an_error_as_asked(small_vocab, small_tokenizer, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", plain("q<_bot>a<_user>r", "ab cd " * 100), plain())
    results = {
        too_long: prepare(data, small_vocab, tmp_path / too_long, Options(max_length=60, too_long=too_long))
        for too_long in ("skip", "truncate")
    }
    assert results["skip"]["counts"]["skipped"] == {"longer than a record of 61 tokens": 1}
    counts = results["truncate"]["counts"]
    assert (counts["skipped"], counts["truncated"], counts["conversations"]) == ({}, 1, 2)
    assert "1 cut at a turn border to fit a record" in summary(results["truncate"])
    found = answers_in(read(results["truncate"]["output"]), small_tokenizer)
    assert found == {"a<_end>": 1, f"{ANSWER}<_end>": 1}
    with refused("d.jsonl, line 1", 61):
        prepare(data, small_vocab, tmp_path / "error", Options(max_length=60, too_long="error"))


def test_bad_lines_are_skipped_on_demand_and_named(small_vocab, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", plain(), "{", *["[]"] * 15)
    result = prepare(data, small_vocab, tmp_path / "out", Options(max_length=60, bad_lines="skip"))
    counts = result["counts"]
    assert counts["skipped"] == {"not JSON": 1, "of no known format": 15}
    assert len(counts["skipped_lines"]["of no known format"]) == 10
    assert counts["skipped_lines"]["not JSON"][0].startswith("d.jsonl:2: not JSON (Expecting property name")
    with refused("16 of the first 17", "d.jsonl:12 and 5 more"):
        prepare(data, small_vocab, tmp_path / "no", Options(max_length=60))


def test_a_line_that_is_quoted_with_half_a_surrogate_pair_ends_no_run(small_vocab, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", plain(), r'{"\ud83d": 1}', r'{"messages": [{"role": "\udc00"}]}')
    result = prepare(data, small_vocab, tmp_path / "out", Options(max_length=60, bad_lines="skip"))
    (named,) = result["counts"]["skipped_lines"]["of no known format"]
    assert named.startswith(r"d.jsonl:2: has the keys \ud83d; expected")
    with refused("line 2", r"\ud83d"):
        prepare(data, small_vocab, tmp_path / "no", Options(max_length=60))


def test_a_folder_that_others_use_meanwhile_hides_no_error(small_vocab, tmp_path, monkeypatch):
    def fail(*_):
        (tmp_path / "new" / "theirs").touch()
        raise UsageError("the line is wrong")

    monkeypatch.setattr(preparing, "_make", fail)
    data = write_lines(tmp_path / "d.jsonl", plain())
    with refused("the line is wrong"):
        prepare(data, small_vocab, tmp_path / "new" / "out", Options())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["theirs"]


def test_a_text_in_a_broken_file_ends_the_run_and_leaves_nothing(small_vocab, tmp_path):
    packed = gzip.compress(b'{"text": "a fox"}\n' * 900)
    (tmp_path / "d.jsonl.gz").write_bytes(packed[:-12])
    with refused("d.jsonl.gz", "after line"):
        prepare(tmp_path / "d.jsonl.gz", small_vocab, tmp_path / "new" / "out", Options(bad_lines="skip"))
    assert not (tmp_path / "new").exists()


def test_output_path_is_a_directory_or_a_mindrecord_file(tmp_path):
    (tmp_path / "there.mindrecord").mkdir()
    cases = {
        "new": "new/dataset.mindrecord",
        "new/": "new/dataset.mindrecord",
        "a/b.mindrecord": "a/b.mindrecord",
        "there.mindrecord": "there.mindrecord/dataset.mindrecord",
        "slash.mindrecord/": "slash.mindrecord/dataset.mindrecord",
    }
    for given_path, expected in cases.items():
        assert writing.output_file(f"{tmp_path}/{given_path}") == tmp_path / expected


@pytest.mark.parametrize(
    "existing", ["dataset.mindrecord", "dataset.mindrecord.db", "dataset.mindrecord.json"]
)
def test_an_existing_result_is_not_overwritten(small_vocab, tmp_path, existing):
    data = write_lines(tmp_path / "d.jsonl", plain())
    (tmp_path / existing).write_text("mine")
    with refused(existing, "--output_path"):
        prepare(data, small_vocab, tmp_path, Options(max_length=64, seed=0))
    assert (tmp_path / existing).read_text() == "mine"


def test_a_file_in_the_way_of_the_output_is_named(small_vocab, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", plain())
    with refused("d.jsonl", "--output_path"):
        prepare(data, small_vocab, data, Options(max_length=64, seed=0))


def test_a_question_without_an_answer_is_refused(small_vocab, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", plain(), '{"messages": [{"role": "user", "content": "q"}]}')
    with refused("d.jsonl, line 2"):
        prepare(data, small_vocab, tmp_path / "out", Options(max_length=64, seed=0))
    assert not (tmp_path / "out").exists()


def test_all_bad_lines_are_named_at_once(small_vocab, tmp_path):
    data = write_lines(
        tmp_path / "d.jsonl",
        plain(),
        '{"input": "q"',
        plain(answer=""),
        r'{"input": "a\ud83db", "output": "c"}',
        '{"messages": [{"role": "user", "content": "q"}]}',
    )
    with refused("d.jsonl, line 2", "not JSON", "3 of 5", "d.jsonl:3, d.jsonl:5"):
        prepare(data, small_vocab, tmp_path / "out", Options(max_length=64, seed=0))
    assert not (tmp_path / "out").exists()


def test_an_empty_data_set_is_refused(small_vocab, tmp_path):
    for lines in ([], ["", "  "]):
        data = write_lines(tmp_path / "d.jsonl", *lines)
        with refused(data):
            prepare(data, small_vocab, tmp_path / "out", Options(max_length=64, seed=0))


def test_the_readmes_command(small_vocab, small_tokenizer, tmp_path):
    """From another folder, which stays clean; a second run refuses with a sentence."""
    write_lines(
        tmp_path / "data.jsonl", plain("<_user>描述一下", "好"), plain("<_user>q<_bot>a<_user>r", "s")
    )
    command = [
        sys.executable,
        COMMAND,
        "--input_dataset_file",
        "data.jsonl",
        "--vocab_file_path",
        small_vocab,
    ]
    command += ["--max_length", "128", "--output_path", "out/"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(
        "read 2 lines = 2 conversations written + 0 skipped\n"
        "  formats: 2 input/output\nwrote 1 records of 129 tokens"
    )
    assert answers_in(read(tmp_path / "out" / "dataset.mindrecord"), small_tokenizer) == {
        "好<_end>": 1,
        "a<_end>": 1,
        "s<_end>": 1,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "out"]
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == (
        "error: out/dataset.mindrecord exists and is not overwritten; "
        "delete it or choose another --output_path\n"
    )


def test_the_released_dialogues_lose_nothing(shared_data, tmp_path):
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    files = [shared_data / f"demo_{name}.jsonl" for name in ("single", "code", "multi", "tool")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    data = write_lines(tmp_path / "all.jsonl", *lines)
    result = prepare(
        data, shared_data / "tokenizer.model", tmp_path / "out", Options(max_length=8192, seed=2024)
    )
    assert result["counts"]["lines"] == result["counts"]["conversations"] == 1700
    tokenizer = TelechatTokenizer(shared_data / "tokenizer.model")
    records = read(tmp_path / "out" / "dataset.mindrecord")
    assert {len(ids) for ids, _ in records} == {8193}
    wanted = Counter(
        m["content"] + "<_end>" for line in lines for m in json.loads(line)["dialog"] if m["role"] == "bot"
    )
    assert answers_in(records, tokenizer) == wanted
    texts = Counter()
    for ids, labels in records:
        assert ((labels == -100) | (labels == ids)).all()
        whole = tokenizer.decode(ids).rstrip("\n").removesuffix("<_pad>" * int((ids == 3).sum()))
        texts.update(whole.split("<_system>")[1:])
    systems = Counter(json.loads(line)["system"] for line in lines)
    assert sum(texts.values()) == 1700
    assert Counter(text.split("<_user>")[0] for text in texts.elements()) == systems
