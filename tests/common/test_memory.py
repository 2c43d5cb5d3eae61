"""Sizes that no machine has, such as 99999999, are one error before any work."""

import pytest
from refusal import refused

from research.telechat2.common import memory
from research.telechat2.common.memory import check_host_memory, host_memory
from research.telechat2.config.optimization import check_optimization
from research.telechat2.config.sharing import prediction_plan
from research.telechat2.config.yaml_files import CHECKOUT, SHIPPED, read_config, shipped_configs
from research.telechat2.data.engines import MOST_WORKERS
from research.telechat2.data.job import LONGEST_RECORD, Options
from research.telechat2.data.preparing import prepare
from research.telechat2.run.space import check_training_memory

GB = 10**9


def test_the_machine_has_memory():
    import os

    assert host_memory() >= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.99


def test_what_is_too_large_is_listed():
    check_host_memory({"weights": 6 * GB, "the cache": 2 * GB}, "num_blocks", 8 * GB)
    with refused("6.0 GB for weights", "3.0 GB for the cache", "8.0 GB", "x"):
        check_host_memory({"weights": 6 * GB, "the cache": 3 * GB, "nothing": 0}, "x", 8 * GB)


def tiny(name: str, **changed) -> dict:
    settings = read_config(CHECKOUT / SHIPPED / "telechat2-tiny" / name)
    settings["model"]["model_config"] |= changed
    return settings


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"num_blocks": 99999999}, "the cache"), ({"seq_length": 16 * 10**9}, "rotary tables"),
     ({"num_layers": 9999999}, "weights")],
)  # fmt: skip
def test_a_prediction_on_cpus_that_cannot_fit(changed, named):
    with refused(f"GB for {named}"):
        prediction_plan(tiny("predict_telechat_tiny.yaml", **changed), 1)


def test_the_cache_of_the_tiny_model_by_hand(monkeypatch):
    """4 layers of keys and values, 2 heads of 64, float32: 4096 bytes a token."""
    monkeypatch.setattr(memory, "host_memory", lambda: 1 * GB)
    settings = tiny("predict_telechat_tiny.yaml", num_blocks=15_000, block_size=16)
    assert settings["model"]["model_config"]["compute_dtype"] == "float32"
    with refused("1.0 GB for the cache"):  # 240,000 tokens, 0.98 GB
        prediction_plan(settings, 1)


def test_a_training_on_cpus_that_cannot_fit():
    settings = tiny("finetune_telechat_tiny.yaml")
    check_training_memory(settings, 2)
    settings["model"]["model_config"]["hidden_size"] = 2**20
    settings["model"]["model_config"]["num_layers"] = 1000
    with refused("GB for weights", "GB for gradients", "GB for moments"):
        check_training_memory(settings, 1)


def test_the_shipped_yamls_for_cpus_fit_into_a_small_machine(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 2 * GB)
    for path in shipped_configs():
        settings = read_config(path)
        if (settings.get("context") or {}).get("device_target") != "CPU":
            continue
        if settings["run_mode"] == "predict":
            prediction_plan(settings, 2 if settings.get("use_parallel") else 1)
        else:
            check_training_memory(settings, 2)


def test_a_sequence_that_no_table_holds():
    with refused("102.4 GB for rotary tables"):  # heads of 64: 512 bytes a position
        check_training_memory(tiny("finetune_telechat_tiny.yaml", seq_length=200_000_000), 1)


def test_epochs_that_mindspore_cannot_count():
    settings = tiny("finetune_telechat_tiny.yaml")
    settings["runner_config"]["epochs"] = 2**31 - 1
    check_optimization(settings)
    settings["runner_config"]["epochs"] = 99_999_999_999
    with refused(99_999_999_999, 2**31 - 1):
        check_optimization(settings)


@pytest.mark.parametrize("length", [LONGEST_RECORD + 1, 99_999_999])
def test_a_record_that_mindrecord_cannot_hold(length):
    Options(max_length=LONGEST_RECORD).check()
    with refused(f"{length:,}", f"{LONGEST_RECORD:,}"):
        Options(max_length=length).check()


def test_a_hundred_thousand_workers(tmp_path):
    with refused("100,000", MOST_WORKERS):
        prepare(["x.jsonl"], "v", tmp_path / "out", Options(), workers=100_000)
    assert not any(tmp_path.iterdir())
