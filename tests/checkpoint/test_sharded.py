"""What a cluster saved slice by slice: merged, it is what was cut; cut anew, as if cut from the whole."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused
from safetensors.numpy import load_file, save_file
from sharding import COUNTERS, assert_same, model_tensors, stored_by, write_shards, write_strategies

from research.telechat2.checkpoint.cluster.reshard import transform
from research.telechat2.text import prompt_format

COMMAND = Path(__file__).resolve().parents[2] / "research/telechat2/transform_ckpt.py"
WHOLE = model_tensors()
CUT_IN_ROWS = ("wq.weight", "wk_v.weight", "w1.weight", "w3.weight", "embedding_weight", "lm_head.weight")


def plan(dp: int, mp: int, stages: int = 1, whole: dict = WHOLE) -> list[dict]:
    """Layouts like those of a dense model: layers dealt to stages, optimizer sharding of all matrices."""
    result = [{} for _ in range(stages)]
    for name, array in whole.items():
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else None
        stage = min(int(layer), stages - 1) if layer else 0 if "tok_embeddings" in name else stages - 1
        if array.ndim != 2:
            result[stage][name] = ((dp * mp,), ((),) * array.ndim, 0)
        else:
            axes = ((0,), ()) if name.endswith(CUT_IN_ROWS) else ((), (0,))
            result[stage][name] = ((dp, mp), axes, -1 if dp > 1 else 0)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of dp 2, mp 2 and two stages, and its strategies."""
    folder = tmp_path_factory.mktemp("saved")
    write_shards(folder / "checkpoint", WHOLE, plan(2, 2, 2))
    write_strategies(folder / "strategy", plan(2, 2, 2))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """One that a test may break."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def merge(source: Path) -> dict:
    """The tensors of the merged checkpoint."""
    target = source / "merged"
    transform(source / "checkpoint", target, "telechat_", source / "strategy")
    assert [path.name for path in target.iterdir()] == ["rank_0"]
    return load_file(target / "rank_0" / "telechat_0.safetensors")


# --- any layout ---------------------------------------------------------------------------------------------


@st.composite
def clusters(draw, whole: dict) -> list[dict]:
    """Layouts of every kind that fit: axes split by none, one or two of the matrix, any optimizer groups."""
    stages: list[dict] = [{} for _ in range(draw(st.sampled_from([1, 2])))]
    matrices = {2: [(2,), (2, 1)], 4: [(4,), (2, 2)], 8: [(8,), (4, 2), (2, 2, 2), (2, 4)]}
    size = draw(st.sampled_from(sorted(matrices)))
    for name, array in whole.items():
        matrix = draw(st.sampled_from(matrices[size]))
        free = draw(st.permutations(range(len(matrix))))
        axes = []
        for _ in range(array.ndim):
            taken = draw(st.integers(0, min(2 if array.ndim > 1 else 1, len(free))))
            axes.append(tuple(free[:taken]))
            free = free[taken:]
        fits = all(
            length % int(np.prod([matrix[-1 - axis] for axis in splits], initial=1)) == 0
            for length, splits in zip(array.shape, axes, strict=True)
        )
        if not fits:
            axes, free = [()] * array.ndim, list(range(len(matrix)))
        copies = int(np.prod([matrix[-1 - axis] for axis in free], initial=1))
        rows = array.shape[0] // int(np.prod([matrix[-1 - axis] for axis in axes[0]], initial=1))
        groups = [0, *(g for g in (2, 4, 8) if copies % g == 0 and rows % g == 0)]
        groups += [-1] if rows % copies == 0 and copies > 1 else []
        layout = (matrix, tuple(axes), draw(st.sampled_from(groups)))
        stages[draw(st.integers(0, len(stages) - 1))][name] = layout
    if not all(stages):
        return [stages[0] | stages[-1]]
    return stages


@settings(max_examples=15, deadline=None)
@given(data=st.data(), experts=st.sampled_from([0, 4]))
def test_merging_and_cutting_anew_undo_and_redo_any_cut(data, experts):
    whole = model_tensors(seed=3, num_layers=1, experts=experts)
    source, target = data.draw(clusters(whole), label="from"), data.draw(clusters(whole), label="to")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "checkpoint", whole, source)
        write_strategies(folder / "strategy", source)
        write_strategies(folder / "target", target)
        assert_same(merge(folder), whole | COUNTERS)
        transform(folder / "checkpoint", folder / "new", "", folder / "strategy", folder / "target")
        transform(folder / "merged", folder / "cut", "", None, folder / "target")
        for rank in range(len([*(folder / "new").iterdir()])):
            expected = stored_by(whole, target, rank)
            for kind in ("new", "cut"):
                assert_same(load_file(folder / kind / f"rank_{rank}" / f"{rank}.safetensors"), expected)


def test_bfloat16_and_accumulated_gradients(tmp_path):
    """bfloat16 keeps its bits, NaN included; accumulated gradients are left out, and counted."""
    import torch
    from safetensors import torch as torch_files

    patterns = {name: (array * 3000).astype(np.int16) for name, array in WHOLE.items()}
    patterns["lm_head.weight"][0] = 0x7FC1
    write_shards(tmp_path / "checkpoint", patterns, plan(2, 1))
    for file in (tmp_path / "checkpoint").glob("*/*.safetensors"):
        tensors = torch_files.load_file(file)
        half = {name: t.view(torch.bfloat16) for name, t in tensors.items() if t.dtype == torch.int16}
        half["accu_grads.lm_head.weight"] = torch.zeros(2)
        torch_files.save_file(tensors | half, file)
    strategy = write_strategies(tmp_path / "strategy", plan(2, 1))
    summary = transform(tmp_path / "checkpoint", tmp_path / "new", "p", strategy)
    found = torch_files.load_file(tmp_path / "new/rank_0/p0.safetensors")
    assert {t.dtype for name, t in found.items() if name not in COUNTERS} == {torch.bfloat16}
    found = {name: t.view(torch.int16).numpy() for name, t in found.items() if name not in COUNTERS}
    assert_same(found, patterns)
    assert "1 accumulated gradients" in str(summary) and "global_step, scale_sense" in str(summary)


# --- what training leaves -----------------------------------------------------------------------------------


def test_merges_the_newest_step_and_records_the_prompt_format(copy):
    newer = {name: array + np.float32(1) for name, array in WHOLE.items()}
    write_shards(copy / "checkpoint", newer, plan(2, 2, 2), step="2_5")
    prompt_format.write(copy / "checkpoint", "plain")
    assert_same(merge_with_record(copy), newer | COUNTERS)


def merge_with_record(source: Path) -> dict:
    transform(source / "checkpoint", source / "merged", "x", source / "strategy")
    assert prompt_format.find(source / "merged/rank_0/x0.safetensors") == "plain"
    return load_file(source / "merged/rank_0/x0.safetensors")


def test_merges_what_the_section_checkpoint_saves(saved, tmp_path):
    """MindFormers' format 2: one folder per step, weights and states apart."""
    for step, value in (("00000004", np.float32(0)), ("00000012", np.float32(5))):
        folder = tmp_path / "checkpoint" / f"iteration_{step}"
        folder.mkdir(parents=True)
        for rank in range(8):
            tensors = stored_by({n: a + value for n, a in WHOLE.items()}, plan(2, 2, 2), rank)
            states = {name: tensors.pop(name) for name in [*tensors] if name.startswith(("adam_", "global"))}
            save_file(tensors, folder / f"telechat-model-{rank:07d}-0000008.safetensors")
            save_file(states, folder / f"telechat-opt-{rank:07d}-0000008.safetensors")
    (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").write_text("12")
    shutil.copytree(saved / "strategy", tmp_path / "strategy")
    expected = {name: array + np.float32(5) for name, array in WHOLE.items()}
    assert_same(merge(tmp_path), expected | COUNTERS)
    next((tmp_path / "checkpoint/iteration_00000012").glob("*-opt-0000003-*")).unlink()
    with refused("-opt-", 3):
        transform(tmp_path / "checkpoint", tmp_path / "again", "x", tmp_path / "strategy")


def test_each_slice_needs_one_holder_only(copy):
    """Saved without redundancy: what several ranks store is in the file of one."""
    files = [copy / f"checkpoint/rank_{rank}/telechat_rank_{rank}-1_10.safetensors" for rank in range(4)]
    for rank, file in enumerate(files):
        drop = [name for name in load_file(file) if name.endswith("norm.weight") and rank != 2]
        edit(file, lambda tensors, drop=drop: [tensors.pop(name) for name in drop])
    assert_same(merge(copy), WHOLE | COUNTERS)


def test_states_may_be_absent_altogether(copy):
    for file in (copy / "checkpoint").glob("*/*.safetensors"):
        edit(file, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith("adam_m")])
    weights = {name: array for name, array in WHOLE.items() if not name.startswith("adam_m")}
    assert_same(merge(copy), weights | COUNTERS)


def test_statistics_of_a_layer_go_to_its_stage(tmp_path):
    """They are in no strategy file."""
    whole = model_tensors(num_layers=2, experts=4)
    write_shards(tmp_path / "checkpoint", whole, plan(2, 1, whole=whole))
    loads = {f"model.layers.{i}.feed_forward.expert_load": np.full(4, i, np.float32) for i in range(2)}
    for file in (tmp_path / "checkpoint").glob("*/*.safetensors"):
        edit(file, lambda tensors: tensors.update(loads))
    source = write_strategies(tmp_path / "strategy", plan(2, 1, whole=whole))
    target = write_strategies(tmp_path / "target", plan(1, 1, 2, whole))
    transform(tmp_path / "checkpoint", tmp_path / "new", "x", source, target)
    for rank, name in enumerate(loads):
        expected = stored_by(whole, plan(1, 1, 2, whole), rank) | {name: loads[name]}
        assert_same(load_file(tmp_path / f"new/rank_{rank}/x{rank}.safetensors"), expected)


def edit(file: Path, change) -> None:
    """Let ``change`` alter the file's dictionary of tensors."""
    tensors = {name: np.array(array) for name, array in load_file(file).items()}
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "ms"})


# --- what is wrong ------------------------------------------------------------------------------------------


def shard(copy: Path, rank: int) -> Path:
    return copy / f"checkpoint/rank_{rank}/telechat_rank_{rank}-1_10.safetensors"


def lose_rank(copy):
    shutil.rmtree(copy / "checkpoint/rank_5")


def lose_file(copy):
    shard(copy, 5).unlink()


def lose_last_rank(copy):
    shutil.rmtree(copy / "checkpoint/rank_7")


def cut_off(copy):
    shard(copy, 6).write_bytes(shard(copy, 6).read_bytes()[:-100])


def mix_steps(copy):
    for rank in range(7):
        file = shard(copy, rank)
        shutil.copy(file, file.with_name(f"telechat_rank_{rank}-1_20.safetensors"))


def name_twice(copy):
    shutil.copy(shard(copy, 3), shard(copy, 3).with_name("telechat_rank_3_1-1_10.safetensors"))


def lose_slice(copy):
    edit(shard(copy, 1), lambda tensors: tensors.pop("model.layers.0.attention.wq.weight"))


def lose_tensor(copy):
    for rank in range(4):
        edit(shard(copy, rank), lambda tensors: tensors.pop("model.layers.0.attention.wq.weight"))


def lose_states_of_one(copy):
    for rank in range(4):
        edit(shard(copy, rank), lambda tensors: tensors.pop("adam_m.model.layers.0.attention.wq.weight"))


def reshape(copy):
    def halve(tensors):
        tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"][:, :8])

    edit(shard(copy, 7), halve)


def retype(copy):
    def narrow(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)

    edit(shard(copy, 7), narrow)


def add_tensor(copy):
    for rank in range(8):
        edit(shard(copy, rank), lambda t, rank=rank: t.update(extra=np.full(3, rank, np.float32)))


def replace_strategies(copy, stages):
    shutil.rmtree(copy / "strategy")
    write_strategies(copy / "strategy", stages)


def fewer_devices(copy):
    replace_strategies(copy, plan(2, 2))


def other_degrees(copy):
    replace_strategies(copy, plan(1, 4, 2))


def other_model(copy):
    replace_strategies(copy, plan(2, 2, 2, model_tensors(num_layers=2, experts=4)))


def lose_first_stage(copy):
    (copy / "strategy/ckpt_strategy_rank_0.ckpt").unlink()


def lose_last_stage(copy):
    (copy / "strategy/ckpt_strategy_rank_4.ckpt").unlink()


def mix_strategies(copy):
    write_strategies(copy / "more", plan(4, 1, 2))
    shutil.copy(copy / "more/ckpt_strategy_rank_4.ckpt", copy / "strategy/ckpt_strategy_rank_5.ckpt")


def break_strategy(copy):
    (copy / "strategy/ckpt_strategy_rank_0.ckpt").write_bytes(b"\xff" * 50)


def no_strategies(copy):
    shutil.rmtree(copy / "strategy")


PROBLEMS = {
    lose_rank: ["lacks rank_5", "rank_7", 8],
    lose_last_rank: ["lacks rank_7", 8],
    lose_file: ["rank_5", "0 files", "epoch 1, step 10"],
    cut_off: ["rank_6-1_10.safetensors"],
    mix_steps: ["rank_7", "0 files", "epoch 1, step 20"],
    name_twice: ["rank_3", "2 files", "epoch 1, step 10"],
    lose_slice: ["layers.0.attention.wq.weight", "ranks 1", [2, 0]],
    lose_tensor: ["1 of the 46 tensors", "model.layers.0.attention.wq.weight"],
    lose_states_of_one: ["1 of the 46 tensors", "adam_m.model.layers.0.attention.wq"],
    reshape: ["rank_7", "lm_head.weight", "float32 [12, 8]", "float32 [12, 16]"],
    retype: ["rank_7", "lm_head.weight", "float16 [12, 16]"],
    add_tensor: ["rank_0", "rank_1", "extra"],
    fewer_devices: ["8 ranks", "rank_3"],
    other_degrees: ["TeleChat"],
    other_model: ["w1.weight", "rank_0"],
    lose_first_stage: ["stages [1]"],
    lose_last_stage: ["8 ranks", "rank_3"],
    mix_strategies: ["stage 1"],
    break_strategy: ["ckpt_strategy_rank_0.ckpt"],
    no_strategies: ["strategy", "ckpt_strategy_rank_0.ckpt", "--dry_run"],
}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.__name__)
def test_whatever_is_wrong_is_said_and_nothing_is_written(copy, problem):
    problem(copy)
    with refused(*PROBLEMS[problem]):
        merge(copy)
    assert not (copy / "merged").exists()


def test_targets_that_do_not_fit_are_refused(saved, tmp_path):
    source = saved / "checkpoint", tmp_path / "new", "x", saved / "strategy"
    experts = model_tensors(num_layers=2, experts=4)
    with refused(16):
        transform(*source, write_strategies(tmp_path / "a", plan(2, 2, whole=experts)))
    with refused(20, 66):
        transform(*source, write_strategies(tmp_path / "b", plan(2, 2, whole=model_tensors(num_layers=3))))
    with refused("[32"):
        transform(*source, write_strategies(tmp_path / "c", plan(1, 32)))
    with refused("--src_ckpt_strategy", "--dst_ckpt_strategy"):
        transform(*source[:3])
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten_and_an_interrupt_leaves_nothing(copy, monkeypatch):
    merge(copy)
    with refused("rank_0"):
        merge(copy)
    kept = copy / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("research.telechat2.checkpoint.cluster.reshard.fsync", interrupt)
    for folder in (kept, copy / "deep/new"):
        with pytest.raises(KeyboardInterrupt):
            transform(copy / "checkpoint", folder, "x", copy / "strategy")
    assert [path.name for path in kept.iterdir()] == ["notes.txt"] and not (copy / "deep").exists()


def test_the_command_of_the_readme(copy):
    arguments = f"--src_ckpt_strategy {copy}/strategy/ --src_ckpt_dir {copy}/checkpoint/ "
    arguments += f"--dst_ckpt_dir {copy}/target/ --prefix telechat_7b"
    command = [sys.executable, COMMAND, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "saved by 8 devices" in done.stdout
    assert_same(load_file(copy / "target/rank_0/telechat_7b0.safetensors"), WHOLE | COUNTERS)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
