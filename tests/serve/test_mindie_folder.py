"""The folder that MindIE starts from: its files, that it answers through ModelRunner, and what is refused."""

import json
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mindie_model import CHECKOUT, EXPERTS, SIZES, assert_likeliest, drive, drive_several, write_yaml
from model_fixtures import RandomModel
from oracle import write_hf_folder
from refusal import refused

from research.telechat2.config.yaml_files import read_config, resolve_config
from research.telechat2.serve.mindie import folder as folder_module
from research.telechat2.serve.mindie import self_test
from research.telechat2.serve.mindie.folder import build, read_folder_sources
from research.telechat2.telechat_config import TelechatConfig
from research.telechat2.text import prompt_format


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> RandomModel:
    return RandomModel(tmp_path_factory.mktemp("dense"), seed=5, **SIZES)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> RandomModel:
    return RandomModel(
        tmp_path_factory.mktemp("experts"), seed=6, num_experts=4, num_experts_per_tok=2, **SIZES
    )


@pytest.fixture(scope="module")
def folders(dense, experts, small_vocab, tmp_path_factory) -> dict[str, Path]:
    """One from a Hugging Face folder with joined rows, one of experts from a MindSpore file, plain format."""
    place = tmp_path_factory.mktemp("serving")
    yamls = tmp_path_factory.mktemp("yamls")
    joined = write_yaml(yamls / "predict_joined.yaml", {"qkv_concat": True})
    moe = write_yaml(yamls / "predict_moe.yaml", moe_config=EXPERTS)
    made = {"dense": place / "telechat2_dense", "experts": place / "deeper" / "telechat2-moe"}
    sources = read_folder_sources(joined, dense.hf, small_vocab.parent, None, None)
    build(sources, made["dense"], npu_mem_size=8, self_test=False)
    sources = read_folder_sources(moe, experts.weights, small_vocab, "plain", None)
    build(sources, made["experts"], npu_mem_size=4, self_test=False)
    return made


@pytest.fixture(scope="module")
def said(folders, dense, tmp_path_factory) -> dict:
    """What a process elsewhere heard from the folders, moved to another place, and from three broken ones.

    The import path has another package ``research`` with another version of the plugin, as a MindFormers
    checkout has it; importing that fails.
    """
    place = tmp_path_factory.mktemp("moved")
    moved = [shutil.copytree(path, place / path.name) for path in folders.values()]
    nameless, misfit, other = (
        shutil.copytree(moved[0], place / name) for name in ("nameless", "misfit", "other_version")
    )
    with (other / "research" / "telechat2" / "telechat.py").open("a") as file:
        file.write("# a later version\n")
    decoy = place / "checkout" / "research" / "telechat2"
    decoy.mkdir(parents=True)
    for package in (decoy, decoy.parent):
        (package / "__init__.py").write_text("raise AssertionError\n")
    write_hf_folder(place / "other", SIZES | {"ffn_hidden_size": 128}, seed=0)
    for copy, weights in ((nameless, ""), (misfit, str(place / "other"))):
        (file,) = copy.glob("*.yaml")
        served = yaml.safe_load(file.read_text(encoding="utf-8"))
        file.write_text(yaml.safe_dump(served | {"load_checkpoint": weights}), encoding="utf-8")
    found = drive(
        tmp_path_factory.mktemp("elsewhere"), moved, [nameless, misfit, other],
        PYTHONPATH=str(place / "checkout"),
    )  # fmt: skip
    return found | {"place": place}


def test_model_runner_answers_as_the_oracle_and_our_own_generate(said, dense, experts):
    for random, told in zip((dense, experts), said["folders"], strict=True):
        assert_likeliest(random, told)
        assert told["warm_up"] == [2, 0]
        assert told["caches"][0] == told["caches"][1]


def test_only_the_folders_own_code_runs(said):
    """Both folders hold the same code, so the second runs that of the first; no run writes into a folder."""
    place = said["place"] / "telechat2_dense"
    running = {Path(file) for file in said["code"]}
    assert {file for file in running if not file.is_relative_to(place / "research")} == set()
    assert place / "research/telechat2/telechat.py" in running
    assert not [*place.rglob("__pycache__")]


def test_prompts_are_in_the_format_the_model_was_tuned_with(said):
    assert all(prompt[0] == 6 for prompt in said["folders"][0]["prompts"])
    assert all(prompt[:2] == [1, 4] for prompt in said["folders"][1]["prompts"])


def test_weights_that_are_not_the_models_are_an_error_never_random(said):
    nameless, misfit, _ = said["broken"]
    assert "load_checkpoint" in nameless
    assert "128" in misfit and "96" in misfit


def test_a_folder_of_another_version_is_refused_in_the_same_process(said):
    *_, error = said["broken"]
    for named in ("other_version", "telechat2_dense/research/telechat2", "research/telechat2/telechat.py"):
        assert named in error


@pytest.mark.slow  # two processes, each with an import and a compilation of its own
def test_two_processes_share_a_model_as_mindie_starts_them(dense, small_vocab, tmp_path):
    """From a Hugging Face folder, with joined rows: each process reads its rows, and both hear the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sources = read_folder_sources(
        write_yaml(tmp_path / "p.yaml", {"qkv_concat": True}), dense.hf, small_vocab, None, 2
    )
    build(sources, tmp_path / "served", npu_mem_size=8)
    cluster = {"MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(port)}
    both = drive_several(tmp_path, [tmp_path / "served"], world_size=2, **cluster)
    for said in both:
        (told,) = said["folders"]
        assert_likeliest(dense, told)


# ---------------------------------------------------------------------- files
def test_one_yaml_modes_and_nothing_left_beside(folders):
    for path in folders.values():
        assert len(list(path.glob("*.yaml"))) == 1
        for file in (path, *path.rglob("*")):
            assert stat.S_IMODE(file.stat().st_mode) == (0o750 if file.is_dir() else 0o640), file
    place = folders["dense"].parent
    assert sorted(path.name for path in place.iterdir()) == ["deeper", "telechat2_dense"]


def test_the_code_is_the_packages_own_and_complete(folders):
    """Every module that a file imports, also within a function, is in the folder or none of this project."""
    code = folders["dense"] / "research"
    held = {file.relative_to(code) for file in code.rglob("*.py")} - {Path("__init__.py")}
    package = CHECKOUT / "research"
    for file in held:
        assert (code / file).read_bytes() == (package / file).read_bytes()
        for name in re.findall(r"^\s*from research\.(\S+) import", (code / file).read_text("utf-8"), re.M):
            module = Path(*name.split("."))
            assert {module.with_suffix(".py"), module / "__init__.py"} & held, (file, name)
    assert Path("telechat2/run/task.py") not in held and Path("telechat2/__init__.py") in held


def test_mindformers_copies_the_entry_alone_and_its_imports_exist(folders):
    """By its own function: it imports whatever the file's import statements name, before it executes it."""
    from mindformers.tools.hub.dynamic_module_utils import get_imports, get_relative_imports

    entry = folders["dense"] / "telechat_mindie.py"
    assert get_relative_imports(entry) == []
    assert set(get_imports(entry)) == {"importlib", "inspect", "sys", "pathlib"}


def test_the_yaml_stands_alone_with_paths(folders, dense, small_vocab):
    path = folders["dense"]
    served = yaml.safe_load((path / "predict_joined.yaml").read_text(encoding="utf-8"))
    assert "base_config" not in served and "auto_register" not in json.dumps(served)
    assert served["load_checkpoint"] == str(dense.hf)
    assert served["processor"]["tokenizer"]["vocab_file"] == str(path / "tokenizer.model")
    assert (path / "tokenizer.model").read_bytes() == small_vocab.read_bytes()
    assert served["model"]["model_config"]["rms_norm_eps"] == 1e-5  # from the base
    assert served["use_parallel"] is False


def test_config_json_holds_the_whole_model_the_experts_too(folders):
    """MindIE reads model_type, torch_dtype and vocab_size; the rest makes the same TelechatConfig again."""
    written = {name: json.loads((path / "config.json").read_text()) for name, path in folders.items()}
    assert written["experts"]["moe_config"] == EXPERTS and "moe_config" not in written["dense"]
    for content in written.values():
        assert (content["model_type"], content["torch_dtype"]) == ("telechat", "float32")
        assert (content["vocab_size"], content["seq_length"], content["qkv_concat"]) == (
            600, 256, content is written["dense"],
        )  # fmt: skip
        ours = {key: value for key, value in content.items() if key not in ("torch_dtype", "auto_map")}
        config = TelechatConfig(**ours)
        assert (config.moe is None) == ("moe_config" not in content)
        assert config.intermediate_size == 96 and config.n_kv_heads == 2


def test_tokenizer_and_generation_files(folders):
    path = folders["experts"]
    tokenizer = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["prompt_format"] == "plain" and "<_start>" in tokenizer["chat_template"]
    generation = json.loads((path / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["top_k"]) == (2, 3)
    told = (path / "mindie.txt").read_text(encoding="utf-8")
    assert f'"modelWeightPath": "{path}"' in told and '"npuMemSize": 4' in told


def test_several_npus_are_one_more_number(dense, small_vocab, tmp_path):
    """A parallel plan of the YAML, or asked for: the YAML of the folder and MindIE's values agree on it."""
    asked = write_yaml(
        tmp_path / "p.yaml", use_parallel=True, parallel_config={"data_parallel": 1, "model_parallel": 2}
    )
    for world_size in (None, 2):
        sources = read_folder_sources(asked, dense.hf, small_vocab, None, world_size)
        target = tmp_path / f"m{world_size}"
        told = build(sources, target, npu_mem_size=8, self_test=False)
        served = yaml.safe_load((target / "p.yaml").read_text(encoding="utf-8"))
        assert served["use_parallel"] is True and served["parallel"]["parallel_mode"] == "STAND_ALONE"
        assert served["parallel_config"]["model_parallel"] == 2 and '"worldSize": 2' in told
    with refused("heads", 4):
        read_folder_sources(asked, dense.hf, small_vocab, None, 4)  # two key/value heads
    with refused("2 NPUs", "--self_test False"):
        build(sources, tmp_path / "n", npu_mem_size=8, self_test=True)


def test_the_recorded_prompt_format_is_taken(dense, small_vocab, tmp_path):
    weights = shutil.copytree(dense.hf, tmp_path / "hf")
    prompt_format.write(weights, "plain")
    assert (
        read_folder_sources(write_yaml(tmp_path / "p.yaml"), weights, small_vocab, None, None).prompt_format
        == "plain"
    )


def test_the_prompt_format_and_its_reason_are_said(dense, small_vocab, tmp_path, capsys):
    read_folder_sources(write_yaml(tmp_path / "p.yaml"), dense.hf, small_vocab, None, None)
    assert f"prompt format: chat (none is recorded with {dense.hf}: give --prompt_format" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------------- self-test
def test_a_self_tests_cache_is_as_large_as_its_one_request():
    """TeleChat2-3B in float32: 2 · 24 layers · 3072 · 4 bytes a token, 0.59 MB; ModelRunner rounds down."""
    sizes = {"num_layers": 24, "num_heads": 24, "hidden_size": 3072, "compute_dtype": "float32"}
    for block_size, blocks in ((16, 8), (128, 1)):
        memory = self_test.memory_of(sizes | {"block_size": block_size}, 125)
        assert memory * 2**30 // (2 * 24 * 3072 * 4 * block_size) == blocks
    shared = self_test.memory_of(
        sizes | {"block_size": 16, "n_kv_heads": 8, "compute_dtype": "bfloat16"}, 125
    )
    assert shared * 6 == self_test.memory_of(sizes | {"block_size": 16}, 125)


def test_a_request_without_blocks_is_refused_in_a_sentence():
    class Runner:
        npu_num_blocks = 3.0

        class model_config:  # noqa: N801
            block_size = 8

    engine = self_test.Engine(Runner)
    row = engine.admit([1] * 9, 7)
    assert (row.blocks, row.slots([0, 7, 8, 15])) == ([0, 1], [0, 7, 8, 15])
    with refused("9 tokens", "answer of 8", "3 blocks of 8", "1 free", kind=ValueError):
        engine.admit([1] * 9, 8)


# ---------------------------------------------------------------------- refusals
def test_a_parallel_yaml_without_a_number_of_npus_asks_for_it(dense, small_vocab, tmp_path):
    parallel = write_yaml(tmp_path / "p.yaml", use_parallel=True)
    with refused("p.yaml", "use_parallel", "model_parallel", "--world_size"):
        read_folder_sources(parallel, dense.hf, small_vocab, None, None)
    assert read_folder_sources(parallel, dense.hf, small_vocab, None, 2).world_size == 2


@pytest.mark.parametrize("size, too_few, enough", [("35b", 1, 2), ("115b", 2, 8)])
def test_a_model_that_so_few_npus_cannot_hold_is_refused(size, too_few, enough):
    """Weights by the files' own headings: 71 GB and 227 GB, for NPUs of 58 GB each."""
    alone, parallel = (
        resolve_config(f"predict_telechat_{size}{kind}.yaml", CHECKOUT) for kind in ("", "_parallel")
    )
    config = read_config(alone)
    assert folder_module.world_size_of(config, alone) == 1
    for npus in {1, too_few}:
        with refused(alone.name, "GB"):
            folder_module.model_config_of(config, alone, npus)
    folder_module.model_config_of(config, alone, enough)
    assert folder_module.world_size_of(read_config(parallel), parallel) == enough


def test_what_does_not_fit_is_named_before_anything_is_written(dense, experts, small_vocab, tmp_path):
    good = write_yaml(tmp_path / "good.yaml")
    foreign = tmp_path / "other.yaml"
    foreign.write_text("model: {model_config: {type: LlamaConfig}}\n")
    uncached = write_yaml(tmp_path / "a.yaml", {"use_past": False})
    mistyped = write_yaml(tmp_path / "b.yaml", {"num_layer": 2})
    small = write_yaml(tmp_path / "c.yaml", {"vocab_size": 512})
    deep = write_yaml(tmp_path / "d.yaml", {"num_layers": 3})
    cases = [
        ((foreign, dense.hf, small_vocab), ("other.yaml", "LlamaConfig")),
        ((uncached, dense.hf, small_vocab), ("a.yaml", "use_past")),
        ((mistyped, dense.hf, small_vocab), ("b.yaml", "num_layer")),
        ((small, dense.hf, small_vocab), ("tokenizer.model", 600, 512)),
        ((deep, dense.hf, small_vocab), (dense.hf, "layer")),
        ((good, experts.hf, small_vocab), ["expert"]),
        ((good, tmp_path / "absent", small_vocab), ("--checkpoint_path", "absent")),
        ((good, None, small_vocab), ("good.yaml", "load_checkpoint", "--checkpoint_path")),
        ((good, dense.hf, None), ("good.yaml", "vocab_file", "--vocab_file_path")),
        ((good, dense.hf, tmp_path), ["tokenizer.model"]),
        ((good, dense.hf, dense.hf / "config.json"), ["config.json"]),
    ]
    for (yaml_file, weights, vocab), named in cases:
        with refused(*named):
            read_folder_sources(yaml_file, weights, vocab, None, None)


@pytest.fixture
def sources(dense, small_vocab, tmp_path):
    return read_folder_sources(write_yaml(tmp_path / "p.yaml"), dense.hf, small_vocab, None, None)


def test_an_existing_folder_stays_as_it_is(sources, tmp_path):
    (tmp_path / "made").mkdir()
    with refused("made", "--output_path"):
        build(sources, tmp_path / "made", npu_mem_size=8)
    assert not any((tmp_path / "made").iterdir())


def test_a_name_that_python_could_not_import_is_refused(sources, tmp_path):
    with refused("'v1.0'"):
        build(sources, tmp_path / "v1.0", npu_mem_size=8)


def test_a_failing_self_test_leaves_nothing(sources, tmp_path, monkeypatch):
    """On a CPU the test is made unless it is asked not to be."""
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nprint('no such luck', 'REGISTER_PATH' in os.environ)\nsys.exit(1)\n")
    monkeypatch.setenv("REGISTER_PATH", str(CHECKOUT))
    monkeypatch.setattr(folder_module, "SELF_TEST", script)
    before = sorted(tmp_path.iterdir())
    with refused("no such luck False", "--self_test False"):
        build(sources, tmp_path / "made", npu_mem_size=8)
    assert sorted(tmp_path.iterdir()) == before


def command(*words, cwd: Path) -> subprocess.CompletedProcess:
    file = CHECKOUT / "research" / "telechat2" / "build_mindie_folder.py"
    return subprocess.run(
        [sys.executable, str(file), *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=600
    )


def test_mistakes_end_in_one_sentence(tmp_path):
    for words, said in (
        (["--yaml_file", "predict_telechat_tyni.yaml"], "predict_telechat_tiny.yaml"),
        (["--yaml_file", "predict_telechat_tiny.yaml"], "names no load_checkpoint; give --checkpoint_path"),
        (["--yaml_file", "p", "--world_size", "0"], "--world_size is 0"),
    ):
        told = command(*words, "--output_path", "made", cwd=tmp_path)
        assert (told.returncode, told.stdout) == (1, "")
        *_, error = told.stderr.splitlines()
        assert error.startswith("error: ") and re.search(said, error)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow  # the self-test compiles the model once more, in a process of its own
def test_the_command_builds_asks_and_says_what_to_type(dense, small_vocab, tmp_path):
    words = ["--yaml_file", write_yaml(tmp_path / "p.yaml"), "--checkpoint_path", dense.hf]
    words += ["--vocab_file_path", small_vocab, "--output_path", "made"]
    told = command(*words, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("self-test: ModelRunner loaded the folder in ")
    assert "./bin/mindieservice_daemon" in told.stdout and "curl" in told.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"p.yaml", "made"}
