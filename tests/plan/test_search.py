"""Plans that are found are legal, fit, and are what the estimate says; and an estimate can be drawn."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from refusal import refused

from research.telechat2.config.check import check
from research.telechat2.config.mindspore_context import check_parallel_sections
from research.telechat2.config.preflight import read_settings
from research.telechat2.plan.estimate.draw import draw, figure_of
from research.telechat2.plan.estimate.estimate import estimate
from research.telechat2.plan.estimate.search import search
from research.telechat2.telechat_plan import setting


def shipped(name: str, changes: dict | None = None) -> dict:
    return read_settings(name, changes or {}, Path.cwd())[1]


@pytest.fixture(scope="module")
def found():
    return search(shipped("finetune_telechat_115b"), device_num=64, memory_gb=60, count=1000)


def test_found_plans_are_legal_and_come_to_what_they_promise(found):
    assert found.plans
    for plan in found.plans[:5]:
        settings = shipped("finetune_telechat_115b", plan.changes)
        checked = check(settings, device_num=64)
        assert checked.global_batch == 64  # the config's own: 8 data-parallel ranks of 8 micro-batches
        again = estimate(settings)
        assert again.throughput.tokens_per_second == plan.estimate.throughput.tokens_per_second
        assert again.peak_bytes == plan.estimate.peak_bytes <= 60e9


def test_the_fastest_come_first_and_every_plan_is_counted(found):
    speeds = [plan.estimate.throughput.tokens_per_second for plan in found.plans]
    assert speeds == sorted(speeds, reverse=True)
    assert found.tried == found.illegal + found.too_large + len(found.plans)
    assert found.too_large


def test_less_memory_makes_no_plan_faster(found):
    less = search(shipped("finetune_telechat_115b"), device_num=64, memory_gb=50)
    best = less.plans[0].estimate
    assert best.peak_bytes <= 50e9
    assert best.throughput.tokens_per_second <= found.plans[0].estimate.throughput.tokens_per_second


def test_the_published_plan_of_7b_is_about_as_good_as_the_best():
    best = search(shipped("finetune_telechat_7b"), device_num=8, memory_gb=58).plans[0]
    assert (best.estimate.workload.dp, best.estimate.workload.mp) == (8, 1)


def test_sequences_are_tried_whole_and_split_as_the_config_says():
    changes = {"parallel_config.context_parallel": 2, "parallel_config.data_parallel": 4}
    found = search(shipped("finetune_telechat_7b_32k", changes), device_num=8, memory_gb=60, count=1000)
    splits = [plan.estimate.workload for plan in found.plans]
    assert {run.gather for run in splits} == {1, 2} and {run.devices for run in splits} == {8}
    split = next(plan for plan in found.plans if plan.estimate.workload.gather == 2)
    again = estimate(shipped("finetune_telechat_7b_32k", changes | split.changes))
    assert (again.memory, again.throughput) == (split.estimate.memory, split.estimate.throughput)


def test_a_model_that_fits_nowhere_is_said_to(found):
    """113,282,916,352 parameters of 16 bytes, with gradient and moments, over 8 NPUs are 226 GB."""
    none = search(shipped("finetune_telechat_115b"), device_num=8, memory_gb=60)
    assert not none.plans
    assert none.least_bytes > 113_282_916_352 * 16 / 8
    assert f"{none.least_bytes / 1e9:.1f} GB" in none.table() and "take more NPUs" in none.table()


@pytest.mark.parametrize(
    ("name", "devices", "named"),
    [
        ("finetune_telechat_7b", 512, ["micro_batch_num is 1, less than pipeline_stage", "batch of 8"]),
        ("finetune_telechat_7b", 3, ["3 devices take part", "1, 2, 4 or a multiple of 8"]),
        ("finetune_telechat_7b_32k", 1024, ["batch of 2 sequences, which no split of these NPUs divides"]),
    ],
)  # fmt: skip
def test_npus_that_no_legal_plan_takes_are_told_the_rule(name, devices, named):
    none = search(shipped(name), device_num=devices, memory_gb=60)
    assert not none.plans and none.illegal == none.tried
    for text in named:
        assert text in none.table()
    assert "more NPUs" not in none.table()
    if devices == 512:  # the remedy
        changes = {"runner_config.gradient_accumulation_steps": 64}
        assert search(shipped(name, changes), device_num=devices, memory_gb=60).plans


def test_a_plan_that_needs_more_than_max_device_memory_sets_that_too():
    best = search(shipped("finetune_telechat_7b"), device_num=8, memory_gb=64).plans[0]
    assert 58e9 < best.estimate.peak_bytes <= 64e9
    pasted = estimate(shipped("finetune_telechat_7b", best.changes))
    assert pasted.limit_gb == 64 and "DOES NOT FIT" not in pasted.table()


@pytest.mark.parametrize(
    ("name", "devices", "gb"),
    [
        ("finetune_telechat_115b", 64, 60), ("finetune_telechat_115b", 512, 54.5),
        ("finetune_telechat_7b", 16, 58), ("finetune_telechat_35b", 16, 50),
        ("finetune_telechat_35b", 32, 57), ("finetune_telechat_39b_a12b", 64, 60),
        ("finetune_telechat_3b", 8, 20),
    ],
)  # fmt: skip
def test_the_words_of_every_plan_run_as_pasted_and_mean_that_plan(name, devices, gb):
    """By the command's own parser and check, also for other numbers of NPUs than the config's."""
    plans = search(shipped(name), device_num=devices, memory_gb=gb, count=1000).plans
    assert plans
    for plan in plans:
        words = shlex.split(plan.words())
        assert words[:1] in (["--set"], [])
        changes = dict(setting(word) for word in words[1:])
        assert changes == plan.changes
        settings = shipped(name, changes)
        assert check(settings, device_num=devices).device_num == devices
        check_parallel_sections(settings)


def test_plans_are_searched_for_clusters_only():
    with refused("use_parallel: True", "parallel.parallel_mode: 1"):
        search(shipped("finetune_telechat_tiny"), device_num=8, memory_gb=60)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("finetune_telechat_115b", 54.5), ("finetune_telechat_115b", 51.2), ("finetune_telechat_115b", 40),
        ("finetune_telechat_7b", 58), ("finetune_telechat_39b_a12b", None),
    ],
)  # fmt: skip
def test_labels_of_the_picture_touch_neither_frame_nor_title_nor_limit(name, limit):
    estimated = replace(estimate(shipped(name)), limit_gb=limit)
    figure = figure_of(estimated)
    figure.canvas.draw()
    memory, passes = figure.axes
    frame, title = memory.get_window_extent(), memory.title.get_window_extent()
    assert len(memory.texts) == len(estimated.memory)
    for text in memory.texts:
        box = text.get_window_extent()
        assert frame.y0 < box.y0 and box.y1 < frame.y1 and box.y1 < title.y0
        if limit:
            line = memory.transData.transform((0, limit))[1]
            assert not box.y0 - 1 < line < box.y1 + 1
    names = [text.get_text() for text in memory.get_legend().get_texts()]
    assert (f"limit: {limit:g} GB" in names) if limit else not any("limit" in name for name in names)
    chunks = estimated.workload.chunks
    shades = [text.get_text() for text in passes.get_legend().get_texts()]
    assert len(shades) == 2 * chunks and shades[0].startswith("forward")


def test_a_picture_is_a_new_png(tmp_path):
    path = tmp_path / "plan.png"
    draw(estimate(shipped("finetune_telechat_115b")), path)
    assert path.read_bytes().startswith(b"\x89PNG")
