"""Whether the processes that run are those that the settings ask for."""

import pytest
from refusal import refused

from research.telechat2.config.yaml_files import read_config, shipped_configs
from research.telechat2.run.processes import LAUNCHED_BY, check_cpu_plan, check_npus, check_processes

ASCEND = {"context": {"device_target": "Ascend"}}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHED_BY, "MS_WORKER_NUM", "TELECHAT_LOCAL_WORKERS", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("context", [{"device_target": "Ascend"}, {"device_target": "CPU"}, {}])
def test_use_parallel_without_a_launcher_is_refused_on_every_target(context):
    with refused("use_parallel is True", "msrun_launcher.sh", "--use_parallel False"):
        check_processes({"use_parallel": True, "context": context})


@pytest.mark.parametrize("name", LAUNCHED_BY)
def test_every_launcher_is_known(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    check_processes({"use_parallel": True, **ASCEND})


def test_several_processes_need_use_parallel(monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "1")
    check_processes({"use_parallel": False})
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    with refused("use_parallel is False", 4):
        check_processes({})


def test_cpus_slice_no_model():
    semi = {"use_parallel": True, "context": {"device_target": "CPU"}, "parallel": {"parallel_mode": 1}}
    with refused("--parallel.parallel_mode 0"):
        check_cpu_plan(semi)
    check_cpu_plan(semi | {"parallel": {"parallel_mode": 0}})
    check_cpu_plan(semi | ASCEND)


@pytest.fixture
def machine(tmp_path):
    """The device files of a machine with two NPUs."""
    for name in ("davinci0", "davinci1", "davinci_manager", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_more_workers_than_npus(machine, monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("TELECHAT_LOCAL_WORKERS", "2")
    check_npus(ASCEND, machine)
    monkeypatch.setenv("TELECHAT_LOCAL_WORKERS", "8")
    with refused("8 workers", "2 NPUs"):
        check_npus(ASCEND, machine)
    check_npus({"context": {"device_target": "CPU"}}, machine)
    check_npus(ASCEND, machine / "nothing known")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6,7,0,1,2,3")
    check_npus(ASCEND, machine)  # it counts what is visible
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    with refused("ASCEND_RT_VISIBLE_DEVICES=1", "1 NPUs"):
        check_npus(ASCEND, machine)


def test_a_device_that_is_not_there(machine):
    check_npus({"context": {"device_target": "Ascend", "device_id": 1}}, machine)
    with refused("device_id is 2", "2 NPUs", "--device_id"):
        check_npus({"context": {"device_target": "Ascend", "device_id": 2}}, machine)


def test_the_shipped_yamls_of_one_process_start(machine):
    for path in shipped_configs():
        config = read_config(path)
        check_npus(config, machine)
        if not config.get("use_parallel"):
            check_processes(config)
