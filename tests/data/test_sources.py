"""Sources: which files are read, packed ones too, mixtures, and batches that cover every line."""

import gzip
import hashlib
import json
import os

import pytest
from data_lines import encoded, plain_lines
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from research.telechat2.data import json_values, sources
from research.telechat2.data.job import Options
from research.telechat2.data.preparing import prepare
from research.telechat2.data.sources import Source, find, input_files, read_batches
from research.telechat2.text.load_vocabulary import load_vocabulary


def lines_of(*files: sources.Source, skip=0, advance=lambda _: None) -> list[bytes]:
    batches = list(read_batches(list(files), [], skip, advance))
    assert [batch.number for batch in batches] == list(range(skip, len(batches) + skip))
    return [line for batch in batches for line in batch.lines]


def test_an_input_is_a_file_a_directory_of_jsonl_or_a_pattern(tmp_path):
    with refused(tmp_path, ".jsonl"):
        input_files(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c.txt", "d.jsonl.gz", "e.jsonl.zst", "f.json"):
        (tmp_path / name).touch()
    names = ["a.jsonl", "b.jsonl", "d.jsonl.gz", "e.jsonl.zst"]
    assert [path.name for path in input_files(tmp_path)] == names
    assert input_files(tmp_path / "c.txt") == [tmp_path / "c.txt"]
    assert [path.name for path in input_files(tmp_path / "[ab].jsonl")] == names[:2]
    with refused(tmp_path / "absent.jsonl"):
        input_files(tmp_path / "absent.jsonl")
    with refused(tmp_path / "x*"):
        input_files(tmp_path / "x*")


def test_a_file_given_twice_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert find([tmp_path]) == [Source(tmp_path / "a.jsonl")]
    with refused(tmp_path / "a.jsonl", f'{{"{tmp_path / "a.jsonl"}": 2}}'):
        find([tmp_path, tmp_path / "a.jsonl"])


def test_directories_in_a_directory_are_not_entered(tmp_path):
    (tmp_path / "deep.jsonl").mkdir()
    (tmp_path / "deep.jsonl" / "b.jsonl").touch()
    with refused(tmp_path, "/**/*.jsonl"):
        input_files(tmp_path)
    (tmp_path / "a.jsonl").touch()
    assert input_files(tmp_path) == [tmp_path / "a.jsonl"]
    assert [path.name for path in input_files(tmp_path / "**" / "*.jsonl")] == ["a.jsonl", "b.jsonl"]


ITEMS = [{"instruction": "甲", "output": "[1]\n\\"}, {"text": "▁\u2028"}, {"a": [{}, 1.50, None]}]


def read(path, content: bytes) -> list:
    path.write_bytes(content)
    return [json.loads(line) for line in lines_of(Source(path)) if line.strip()]


@pytest.mark.parametrize("indent", [None, 1, "\t"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_json_array_is_read_item_by_item(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(json_values, "_CHUNK", chunk)
    monkeypatch.setattr(sources, "BATCH_BYTES", 50)
    for name in ("a.json", "b.jsonl", "c.JSON", "d.txt", "e.ndjson"):
        for before in (b"", b"\xef\xbb\xbf", b" \n"):
            text = before + json.dumps(ITEMS, indent=indent, ensure_ascii=False).encode()
            assert read(tmp_path / name, text) == ITEMS
            assert read(tmp_path / name, text + b"\n" + text) == ITEMS * 2  # as cat joins two
    assert read(tmp_path / "a.json", b" [ ] ") == [] == read(tmp_path / "a.json", b"[]")
    apart = b"\n".join(json.dumps(item, indent=indent).encode() for item in ITEMS)
    assert read(tmp_path / "a.json", apart) == ITEMS  # objects one after the other, over several lines or not
    long = b'{"a": 1' + b"0" * 5000 + b"}"
    (tmp_path / "l.json").write_bytes(b"[" + long + b"]")
    assert lines_of(Source(tmp_path / "l.json")) == [long]
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(json.dumps(ITEMS).encode()))
    assert [json.loads(line) for line in lines_of(Source(tmp_path / "p.json.gz"))] == ITEMS


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b'[{"a": 1}, {"b": 2}', ["item 2"]),
        (b'[{"a": 1}, {"b": }]', ["item 2", "JSON"]),
        (b'[{"a": 1} {"b": 2}]', ["'{'", "item 1", "comma"]),
        (b'[{"a": 1}, ]', ["item 2", "JSON"]),
        (b'[{"a": "\xff"}]', ["UTF-8"]),
        (b'{\n"a": 1\n', ["item 1", "JSON"]),
    ],
)
def test_an_array_that_is_broken_is_named_with_its_item(tmp_path, content, values):
    with refused("a.json", *values):
        read(tmp_path / "a.json", content)


def test_problems_of_an_array_name_the_item(small_vocab, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([*plain_lines(2), {"input": "q"}]))
    with refused("a.json, item 3", "output"):
        prepare(tmp_path / "a.json", small_vocab, tmp_path / "out", Options(max_length=100))


def test_a_directory_reads_all_endings_and_names_the_rest(tmp_path, capsys):
    for name in ("A.JSONL", "b.ndjson", "C.Jsonl.GZ"):
        (tmp_path / name).touch()
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "e.json").write_text('{"input": "q", "output": "a"}')
    (tmp_path / "f.JSON").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "dataset_infos.json").write_text('{"splits": {"train": 3}}')
    (tmp_path / "part.parquet").touch()
    (tmp_path / ".hidden.jsonl").touch()
    found = [path.name for path in input_files(tmp_path)]
    assert sorted(found) == ["A.JSONL", "C.Jsonl.GZ", "b.ndjson", "d.json", "e.json", "f.JSON"]
    said = capsys.readouterr().err
    assert "not read: dataset_infos.json, part.parquet" in said and "hidden" not in said


def test_byte_order_marks_at_the_joins_of_files_are_taken_off(small_vocab):
    words = load_vocabulary(small_vocab)
    bom = b"\xef\xbb\xbf"
    marked = [bom + json.dumps(line).encode() for line in plain_lines(3)] + [bom]
    result = encoded(words, *marked, bad_lines="error")
    assert result.tokens.tolist() == encoded(words, *plain_lines(3)).tokens.tolist()
    assert result.counts["skipped"] == {"blank line": 1}


def test_a_packed_file_by_another_name_is_told_so(tmp_path, small_vocab):
    for name, start, said in (
        ("a.jsonl", gzip.compress(b"{}"), "packed by gzip: give it a name in .gz"),
        ("b.jsonl", "{}".encode("utf-16"), "UTF-16"),
    ):
        (tmp_path / name).write_bytes(start)
        with refused(name, "UTF-8", said):
            prepare(tmp_path / name, small_vocab, tmp_path / "out", Options(max_length=100))


def test_zstandard_is_missed_before_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    (tmp_path / "a.jsonl").touch()
    assert find([tmp_path]) == [Source(tmp_path / "a.jsonl")]
    (tmp_path / "b.jsonl.zst").touch()
    with refused("b.jsonl.zst", "pip install zstandard"):
        find([tmp_path])


def test_a_mixture_names_paths_from_its_own_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.jsonl", "deep/b.jsonl", "deep/c.jsonl"):
        (tmp_path / name).touch()
    mixture = tmp_path / "mixture.json"
    (tmp_path / "inner.json").write_text('{"a.jsonl": 1}')
    mixture.write_text('{"a.jsonl": 0.5, "deep": 2}')
    found = [(source.path.name, source.weight) for source in find([mixture])]
    assert found == [("a.jsonl", 0.5), ("b.jsonl", 2.0), ("c.jsonl", 2.0)]
    for content, *values in (
        ("", "empty"),
        ('{"train": [{"instruction": "q", "output": "a"}]}', "train", "list", "array"),
        ('{"a": {"file_name": "a.jsonl"}}', "a is an object"),
        ('{"deep\\\\b.jsonl": 1}', r"deep\b.jsonl", "/ for"),
        ('{"inner.json": 1}', tmp_path / "inner.json", "nest"),
        ("{}", '{"path": weight'),
        ('{"a.jsonl": 0}', "a.jsonl", "weight 0", "(0, 1000]"),
        ('{"a.jsonl": 1, "deep": 2, "a.jsonl": 1}', "a.jsonl", "2 weights", "sum"),
        ('{"a.jsonl": "2"}', "a.jsonl", "'2'"),
        ('{"a.jsonl": 1' + "0" * 5000 + "}", "a.jsonl", "(0, 1000]"),
        ('{"no.jsonl": 1}', tmp_path / "no.jsonl", "folder"),
    ):
        mixture.write_text(content)
        with refused(mixture, *values):
            find([mixture])


def test_weights_take_lines_by_chance_or_several_times(small_vocab):
    words = load_vocabulary(small_vocab)
    lines = plain_lines(400)
    thrice = encoded(words, *lines, weight=3.0)
    once = encoded(words, *lines)
    assert thrice.copies.sum() == 1200 and thrice.counts["totals"]["copies"] == 800
    assert thrice.tokens.tolist() == once.tokens.tolist()  # memory does not grow with the weight
    for name in ("tokens", "trained_tokens"):
        assert thrice.counts["totals"][name] == 3 * once.counts["totals"][name] > 0
    half = encoded(words, *lines, weight=0.5)
    left_out = half.counts["skipped"]["left out by the weight of its file"]
    assert len(half.lengths) == 400 - left_out and 150 < left_out < 250
    more = encoded(words, *lines, weight=2.25)
    assert 850 < more.copies.sum() < 950
    again = encoded(words, *lines, weight=0.5)
    other = encoded(words, *lines, weight=0.5, seed=1)
    assert again.tokens.tolist() == half.tokens.tolist() != other.tokens.tolist()


@given(
    files=st.lists(
        st.lists(
            st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"").replace(b"[", b"(")), max_size=30
        ),
        max_size=4,
    ),
    size=st.integers(1, 200),
    ended=st.booleans(),
)
def test_batches_hold_every_line_once_whatever_their_size(tmp_path_factory, files, size, ended):
    folder = tmp_path_factory.mktemp("files")
    found = []
    for number, lines in enumerate(files):
        content = b"".join(line + b"\n" for line in lines)
        content = content if ended else content[:-1]
        path = folder / f"{number}.jsonl"
        path.write_bytes(content)
        found.append(Source(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BATCH_BYTES", size)
        states = []
        batches = list(read_batches(found, states, 0, lambda _: None))
        lines = [line for batch in batches for line in batch.lines]
        assert b"".join(lines) == b"".join(source.path.read_bytes() for source in found)
        assert all(0 <= line.find(b"\n") == len(line) - 1 or b"\n" not in line for line in lines)
        assert list(read_batches(found, [], 2, lambda _: None)) == batches[2:]
    assert [state.sha256 for state in states] == [
        hashlib.sha256(source.path.read_bytes()).hexdigest() for source in found
    ]


def packed(path, content: bytes):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content[:50]) + gzip.compress(content[50:]))  # two members, as by cat
    else:
        zstandard = pytest.importorskip("zstandard", reason="needs zstandard, see pyproject.toml")
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
        path.write_bytes(compress(content[:50]) + compress(content[50:]))
    return Source(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_packed_files_give_the_lines_of_the_plain_one(tmp_path, suffix):
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(2000))
    source = packed(tmp_path / f"a{suffix}", content)
    advanced = []
    assert lines_of(source, advance=advanced.append) == content.splitlines(keepends=True)
    assert sum(advanced) == source.path.stat().st_size


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_broken_packed_file_is_named(tmp_path, suffix, damage):
    content = b"".join(
        json.dumps({"text": hashlib.md5(b"%d" % i).hexdigest()}).encode() + b"\n" for i in range(999)
    )
    source = packed(tmp_path / f"a{suffix}", content)
    whole = source.path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 40]) + whole[middle + 40 :]
    source.path.write_bytes({"cut": whole[:-9], "flipped": flipped, "foreign": content}[damage])
    with refused(f"a{suffix}", "after line"):
        lines_of(source)


def test_a_file_without_line_breaks_is_no_jsonl(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"[]\n" + b"x" * (2 << 20))
    with refused("a.jsonl, line 2", "1 MB"):
        lines_of(Source(path))


def test_what_is_no_file_is_named_as_what_it_is(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with refused(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "comma"):
        find([f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"])
    os.mkfifo(tmp_path / "pipe")
    with refused(tmp_path / "pipe", "pipe or device"):
        find([tmp_path / "pipe"])
