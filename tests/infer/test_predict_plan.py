"""What processes that predict tell each other, and what is refused before they start."""

import socket
import threading
from types import SimpleNamespace

import pytest
from predict_model import write_yaml
from refusal import refused

from research.telechat2.config.sharing import check_memory, prediction_plan, processes_of_run
from research.telechat2.config.yaml_files import read_config
from research.telechat2.infer import process_group
from research.telechat2.infer.chat import read_prompts
from research.telechat2.infer.process_group import Group
from research.telechat2.run.prediction import share_model


@pytest.fixture
def settings(tmp_path):
    def of(model_config=None, **sections) -> dict:
        return read_config(write_yaml(tmp_path / "p.yaml", model_config, **sections))

    return of


def test_processes_are_those_that_msrun_says(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    assert processes_of_run() == 1
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    assert processes_of_run() == 4


def test_all_that_run_take_part_unless_the_yaml_gives_a_number(settings):
    assert prediction_plan(settings(), 1) is None
    assert prediction_plan(settings(parallel_config={"model_parallel": 8}), 1) is None  # not use_parallel
    assert prediction_plan(settings(use_parallel=True), 1) == {}
    assert prediction_plan(settings(use_parallel=True), 2) == {"model_parallel": 2, "vocab_emb_dp": False}
    given = {"model_parallel": 2, "vocab_emb_dp": False, "data_parallel": 1}
    assert prediction_plan(settings(use_parallel=True, parallel_config=given), 2) == given


@pytest.mark.parametrize(
    ("processes", "change", "sections", "named"),
    [
        (2, {}, {"use_parallel": False}, ("use_parallel", "2 processes")),
        (1, {}, {"parallel_config": {"model_parallel": 2}}, ("model_parallel is 2", "1 process", "msrun")),
        (2, {}, {"parallel_config": {"model_parallel": 4}}, ("model_parallel is 4", "2 processes")),
        (2, {}, {"parallel_config": {"data_parallel": 2}}, ("data_parallel is 2",)),
        (2, {}, {"parallel_config": {"pipeline_stage": 2}}, ("pipeline_stage 2",)),
        (3, {"n_kv_heads": 4}, {}, ("num_heads 4", "model_parallel 3")),
        (4, {}, {}, ("n_kv_heads 2", "model_parallel 4")),
        (2, {"intermediate_size": 97}, {}, ("intermediate_size 97",)),
        (2, {"vocab_size": 601}, {}, ("vocab_size 601",)),
        (2, {"use_past": False}, {}, ("use_past",)),
        (2, {"num_layer": 3}, {}, ("num_layer", "num_layers")),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(settings, processes, change, sections, named):
    with refused(*named):
        prediction_plan(settings(change, **{"use_parallel": True} | sections), processes)


def test_processes_without_a_common_seed_are_refused(settings, monkeypatch):
    config = settings(use_parallel=True, seed=None)
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with refused("seed is null", "--seed"):
        share_model(config, prediction_plan(config, processes_of_run()))


def test_what_cannot_fit_is_refused_on_npus_alone(settings):
    """35B in float16: 71 GB of weights, 12.9 GB of cache; halved, both fit."""
    sizes = {"hidden_size": 6144, "num_layers": 64, "num_heads": 48, "n_kv_heads": 48, "vocab_size": 131072}
    sizes |= {"intermediate_size": 20480, "num_blocks": 512, "param_init_type": "float16"}
    sizes |= {"compute_dtype": "float16", "res_dtype": "float16"}
    ascend = {"use_parallel": True, "context": {"device_target": "Ascend"}}
    with refused("70.9 GB", "12.9 GB", "58GB"):
        prediction_plan(settings(sizes, **ascend), 1)
    assert prediction_plan(settings(sizes, **ascend), 2)["model_parallel"] == 2
    context = {"device_target": "Ascend", "max_device_memory": "40GB"}  # 35.44e9 + 6.44e9 bytes: 39.005 GiB
    assert prediction_plan(settings(sizes, use_parallel=True, context=context), 2)
    context["max_device_memory"] = "39GB"
    with refused("39GB"):
        prediction_plan(settings(sizes, use_parallel=True, context=context), 2)
    with refused("max_device_memory", "'much'"):
        check_memory(SimpleNamespace(), 1, "much")


@pytest.fixture
def groups(monkeypatch):
    """Three processes, as threads; a stranger without the password connects first."""
    ready, told = threading.Event(), []

    def add(ranks, numbers):
        if ranks.rank == 0:
            told.extend(numbers)
            stranger = socket.create_connection(("127.0.0.1", numbers[0]))
            stranger.sendall(b"no password\n")
            ready.set()
        ready.wait(10)
        return list(told)

    monkeypatch.setattr(process_group, "_sum", add)
    monkeypatch.delenv("MS_SCHED_HOST", raising=False)
    found = {}
    ranks = [SimpleNamespace(size=3, rank=rank) for rank in range(3)]
    threads = [
        threading.Thread(target=lambda one=one: found.setdefault(one.rank, Group(one))) for one in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in range(3)]


def test_what_the_first_process_reads_all_hear(groups):
    assert [group.first for group in groups] == [True, False, False]
    assert len({group.seed for group in groups}) == 1
    lines = ["生抽？\n", "\udcff broken \u2028 line\n", "", "/new"]
    heard = [[], []]
    threads = [
        threading.Thread(target=lambda one=one, to=to: to.extend(one.lines(())))
        for one, to in zip(groups[1:], heard, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert list(groups[0].lines(lines)) == lines
    for thread in threads:
        thread.join(20)
    assert heard == [lines, lines]  # and they end when the first does


def test_a_process_alone_hears_itself():
    assert list(Group().lines(["a"])) == ["a"] and Group().first


def test_a_text_file_is_one_question_and_a_jsonl_file_a_batch(tmp_path):
    text, lines = tmp_path / "text.txt", tmp_path / "lines.jsonl"
    text.write_text("\ufeff第一行\n\n第二行\n", encoding="utf-8")
    (asked,) = read_prompts(text, "be brief")
    assert [message["content"] for message in asked.messages] == ["be brief", "第一行\n\n第二行"]
    lines.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 2, encoding="utf-8")
    assert len(read_prompts(lines)) == 2
    text.write_text(" \n")
    with refused("text.txt"):
        read_prompts(text)
    text.write_bytes(b"\xff")
    with refused("text.txt, line 1", "UTF-8"):
        read_prompts(text)
