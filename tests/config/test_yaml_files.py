"""What the arguments of run_mindformer.py mean: files, folders, values and overrides."""

import sys
from functools import partial
from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.config.overrides import (
    apply_overrides,
    parse_options,
    parse_overrides,
    parse_value,
    value_word,
)
from research.telechat2.config.yaml_files import join_overrides, read_config, resolve_config, resolve_folder

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shipped(tmp_path) -> Path:
    """A checkout with the YAML files of all sizes, empty, as the project will ship them."""
    root = tmp_path / "checkout"
    for size in ("7b", "35b", "115b", "39b_a12b"):
        folder = root / "research" / "telechat2" / f"telechat2-{size.replace('_', '-')}"
        folder.mkdir(parents=True)
        (folder / f"finetune_telechat_{size}.yaml").touch()
        (folder / f"predict_telechat_{size}_parallel.yaml").touch()
        if size != "39b_a12b":
            (folder / f"predict_telechat_{size}.yaml").touch()
    (root / "research" / "telechat2" / "telechat2-base").mkdir()
    (root / "research" / "telechat2" / "telechat2-base" / "finetune.yaml").touch()
    return root


@pytest.mark.parametrize(
    ("spelling", "file"),
    [
        ("research/telechat2/finetune_telechat_115b.yaml", "telechat2-115b/finetune_telechat_115b.yaml"),
        ("./research/telechat2/predict_telechat_7b.yaml", "telechat2-7b/predict_telechat_7b.yaml"),
        ("./research/telechat2/predict_telechat_35b.yaml", "telechat2-35b/predict_telechat_35b.yaml"),
        ("./research/telechat2/predict_telechat_115b.yaml", "telechat2-115b/predict_telechat_115b.yaml"),
        (
            "./research/telechat2/predict_telechat_39b_a12b.yaml",
            "telechat2-39b-a12b/predict_telechat_39b_a12b_parallel.yaml",
        ),
        (
            "research/telechat2/infer/predict_telechat2_7b.yaml",
            "telechat2-7b/predict_telechat_7b_parallel.yaml",
        ),
        (
            "research/telechat2/telechat2-7b/finetune_telechat_7b.yaml",
            "telechat2-7b/finetune_telechat_7b.yaml",
        ),
        ("finetune_telechat_35b.yaml", "telechat2-35b/finetune_telechat_35b.yaml"),
        ("finetune_telechat_35b", "telechat2-35b/finetune_telechat_35b.yaml"),
    ],
)
def test_every_config_spelling_of_the_readme_names_one_file(shipped, tmp_path, spelling, file):
    assert resolve_config(spelling, tmp_path, shipped) == shipped / "research" / "telechat2" / file


def test_a_users_own_config_wins_over_the_shipped_one(shipped, tmp_path):
    own = tmp_path / "finetune_telechat_7b.yaml"
    own.touch()
    assert resolve_config("finetune_telechat_7b.yaml", tmp_path, shipped) == own


@pytest.mark.parametrize("name", ["finetune_telechat_11b.yaml", "/home/me/finetune_telechat_115b.yaml"])
def test_unknown_config_names_the_nearest(shipped, tmp_path, name):
    with refused("finetune_telechat_115b.yaml"):
        resolve_config(name, tmp_path, shipped)


def test_a_folder_of_the_users_is_never_taken_for_a_shipped_file(shipped, tmp_path):
    with refused("my_configs", "finetune_telechat_7b.yaml"):
        resolve_config("my_configs/finetune_telechat_7b.yaml", tmp_path, shipped)


def test_ambiguous_config_lists_the_candidates(shipped, tmp_path):
    twin = shipped / "research" / "telechat2" / "telechat2-35b" / "finetune_telechat_7b.yaml"
    twin.touch()
    with refused(2, "telechat2-35b", "telechat2-7b"):
        resolve_config("finetune_telechat_7b.yaml", tmp_path, shipped)


def test_register_path_is_found_below_the_checkout_from_anywhere(tmp_path):
    assert resolve_folder("./research/telechat2", tmp_path) == CHECKOUT / "research" / "telechat2"
    (tmp_path / "research" / "telechat2").mkdir(parents=True)
    assert resolve_folder("research/telechat2", tmp_path) == tmp_path / "research" / "telechat2"
    with refused("nowhere"):
        resolve_folder("nowhere", tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("false", False),
        ("3", 3),
        ("-1", -1),
        ("1e-4", 1e-4),
        ("1.5E2", 150.0),
        ("[1, [2, x]]", [1, [2, "x"]]),
        ("{a: 1}", {"a": 1}),
        ("null", None),
        ("None", "None"),
        ("'3'", "3"),
        ("12:30", "12:30"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("/data/a: b#c", "/data/a: b#c"),
        ("生抽", "生抽"),
        ("", ""),
    ],
)
def test_values_on_the_command_line(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_override_pairs_and_options():
    words = ["--optimizer.eps", "-1", "--a.b=x=y", "--c.d", "True"]
    assert parse_overrides(words) == {"optimizer.eps": -1, "a.b": "x=y", "c.d": True}
    assert parse_options(["a.b=False", "c=1,2", "d=[3]"]) == {"a.b": False, "c": [1, 2], "d": [3]}
    assert join_overrides({"a": 1, "b": 2}, {"a": 1}, {"c": 3}) == {"a": 1, "b": 2, "c": 3}
    with refused("a", 1, 2):
        join_overrides({"a": 1}, {"a": 2})
    with refused("--a.b"):
        parse_overrides(["--a.b", "--c.d", "1"])
    with refused("'lost'"):
        parse_overrides(["lost"])
    with refused("--options a", "key=value"):
        parse_options(["a"])


def test_overrides_set_new_keys_but_no_new_sections():
    config = {"model": {"model_config": {"seq_length": 8}}, "callbacks": [{"type": "x"}], "processor": None}
    values = {"model.model_config.new": 1, "context.device_id": 2, "processor.type": "p", "seed": 3}
    apply_overrides(config, values)
    assert config["model"]["model_config"] == {"seq_length": 8, "new": 1}
    assert (config["context"], config["processor"], config["seed"]) == ({"device_id": 2}, {"type": "p"}, 3)
    for key, *named in (
        ("modle.model_config.seq_length", "`modle`", "model"),
        ("model.model_confg.seq_length", "`model.model_confg`", "model_config"),
        ("sead", "seed"),
        ("top_k", "--model.model_config.top_k"),
        ("max_new_tokens", "--model.model_config.max_decode_length"),
        (
            "processor.tokenizer.vocab_file",
            "`processor.tokenizer`",
            "predict_….yaml",
        ),
        ("seq_length", "--model.model_config.seq_length"),
        ("callbacks.type", "`callbacks`"),
        ("seed.x", "`seed`", "3"),
    ):
        with refused(key.partition(".")[0], *named):
            apply_overrides(config | {"processor": None}, {key: 1})


def test_a_chain_of_base_configs_merges_as_mindformers_merges_it(tmp_path):
    (tmp_path / "a.yaml").write_text("x: {p: 1, q: {r: 1, s: [1, 2]}}\ny: 1\n")
    (tmp_path / "b.yaml").write_text("base_config: a.yaml\nx: {q: {s: [3]}}\nz: null\n")
    (tmp_path / "c.yaml").write_text("base_config: [b.yaml]\ny: {k: 2}\n")
    expected = {"x": {"p": 1, "q": {"r": 1, "s": [3]}}, "y": {"k": 2}, "z": None}
    assert read_config(tmp_path / "c.yaml") == expected
    (tmp_path / "d.yaml").write_text("base_config: nowhere.yaml\n")
    with refused("d.yaml", "base_config", "nowhere.yaml"):
        read_config(tmp_path / "d.yaml")
    (tmp_path / "h.yaml").write_text("base_config: 3\n")
    with refused("h.yaml", "base_config", "[3]"):
        read_config(tmp_path / "h.yaml")
    (tmp_path / "i.yaml").write_text("base_config:\na: 1\n")
    assert read_config(tmp_path / "i.yaml") == {"a": 1}
    (tmp_path / "e.yaml").write_text("a: [1\n")
    with refused("e.yaml", "YAML"):
        read_config(tmp_path / "e.yaml")


def test_numbers_are_those_of_yaml_1_2_and_a_key_stands_once(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("a: 1e-5\nb: '1e-5'\nc: [1E3, -2.5e-1]\nd: 1e5x\n", encoding="utf-8")
    assert read_config(path) == {"a": 1e-5, "b": "1e-5", "c": [1000.0, -0.25], "d": "1e5x"}
    path.write_text("seed: 1\nmodel:\n  model_config: {}\nseed: 2\n", encoding="utf-8")
    with refused("seed", 1):
        read_config(path)
    path.write_text("model:\n  model_config: {a: 1}\n  model_config: {b: 2}\n", encoding="utf-8")
    with refused("model_config", 2):
        read_config(path)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        3,
        1e-5,
        [8, 8],
        {"a": True, "b": "1f1b", "c": None},
        "text",
        "True",
        "3",
        "",
        [[1], []],
    ],
)
def test_a_value_is_written_as_it_is_read(value):
    assert parse_value(value_word(value)) == value


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"a": "base_config: a.yaml\n"}, ["a.yaml", "stands on it again"]),
        ({"a": "base_config: b.yaml\n", "b": "base_config: a.yaml\n"}, ["b.yaml", "a.yaml", "again"]),
        ({"a": "model: &m [*m]\n"}, ["a.yaml", "alias"]),
        ({"a": "model: &m\n  x: {y: *m}\n"}, ["a.yaml", "alias"]),
        ({"a": "model: " + "[" * 2000}, ["a.yaml", "nested"]),
        ({"a": "seed: 1 # 配置\n".encode("gb18030")}, ["a.yaml", "byte 10", "UTF-8"]),
    ],
    ids=["itself", "circle", "list", "section", "deep", "encoding"],
)  # fmt: skip
def test_a_file_without_end_or_in_another_encoding_is_named(tmp_path, files, named, request):
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(1000)  # libraries raise it
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / f"{name}.yaml").write_bytes(content)
    with refused(*named):
        read_config(tmp_path / "a.yaml")


def test_a_base_and_an_alias_may_be_used_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 3\n")
    (tmp_path / "b.yaml").write_text("base_config: c.yaml\n")
    (tmp_path / "a.yaml").write_text("base_config: [b.yaml, c.yaml]\nx: &x {k: 1}\ny: [*x, *x]\n")
    assert read_config(tmp_path / "a.yaml") == {"seed": 3, "x": {"k": 1}, "y": [{"k": 1}, {"k": 1}]}


@pytest.mark.parametrize("value", ["2026-13-45", "9" * 5000])
def test_a_value_that_python_cannot_hold_is_named(tmp_path, value):
    path = tmp_path / "x.yaml"
    path.write_text(f"seed: {value}\n")
    with refused(path):
        read_config(path)
    parse_value(value)
