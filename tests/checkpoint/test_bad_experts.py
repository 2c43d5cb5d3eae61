"""Experts that are missing, too many, of two minds, or transposed: a sentence with layer and expert."""

import json

import numpy as np
import pytest
from oracle import stored_tensors, write_hf_folder
from refusal import refused
from safetensors.numpy import load_file, save_file

from research.telechat2.checkpoint.convert import convert_to_mindspore, convert_to_torch

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "ffn_hidden_size": 40, "n_layer": 4}
EXPERT = "transformer.h.{}.mlp.local_experts.{}."
STACK = "model.layers.{}.feed_forward.ffn."


@pytest.fixture(params=["config", "inferred"])
def hf(tmp_path, request):
    """A sound folder of four layers with four experts each, with its config.json and without."""
    write_hf_folder(tmp_path / "hf", MOE, seed=1)
    if request.param == "inferred":
        (tmp_path / "hf" / "config.json").unlink()
    return tmp_path / "hf"


@pytest.fixture
def ms(hf, tmp_path):
    convert_to_mindspore(hf, tmp_path / "ms")
    return tmp_path / "ms"


def refuses(folder, change, *values):
    """The error of converting the changed folder names ``values``, and nothing is written."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file)
    to_other_side = convert_to_torch if folder.name == "ms" else convert_to_mindspore
    with refused(*values) as caught:
        to_other_side(folder, folder.parent / "new")
    assert not (folder.parent / "new").exists()
    return str(caught.value)


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def test_a_tensor_of_an_expert_is_missing(hf):
    text = refuses(
        hf,
        without(EXPERT.format(3, 2) + "down_proj.bias"),
        "4 layers, hidden size 64, 4 experts of feed-forward size 40, ",
    )
    assert text.splitlines()[1:] == ["  1 missing: down_proj.bias of layer 3's expert 2"]


def test_a_whole_expert_is_missing(hf):
    leaves = ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "down_proj.bias")
    gone = [EXPERT.format(1, 3) + leaf for leaf in leaves] + [
        EXPERT.format(2, 0) + leaf for leaf in leaves[:2]
    ]
    text = refuses(hf, without(*gone))
    missing = "layer 1's expert 3, gate_proj.weight and up_proj.weight of layer 2's expert 0"
    assert text.splitlines()[1:] == [f"  2 missing: {missing}"]


def test_the_last_expert_is_missing_everywhere(hf):
    """The router still has a row for it."""
    text = refuses(
        hf,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".local_experts.3." in name],
        "4 experts of feed-forward size 40",
    )
    assert "4 missing: layer 0's expert 3, layer 1's expert 3, layer 2's expert 3, layer 3's expert 3" in text


def test_a_router_is_missing(hf):
    gone = "transformer.h.2.mlp.router.weight"
    assert refuses(hf, without(gone)).splitlines()[1:] == [f"  1 missing: {gone}"]


def test_no_router_at_all(hf):
    text = refuses(
        hf, lambda tensors: [tensors.pop(name) for name in list(tensors) if "router" in name], "4 experts of"
    )
    assert "4 missing: transformer.h.0.mlp.router.weight, " in text and "unknown" not in text


@pytest.mark.parametrize("number", [4, 100, 999_999_999])
def test_an_expert_beyond_the_last(hf, number):
    name = EXPERT.format(1, number) + "up_proj.weight"
    text = refuses(hf, lambda tensors: tensors.update({name: np.ones((40, 64), np.float32)}))
    assert text.splitlines()[1:] == [f"  1 beyond the 4 experts, 0 to 3: {name}"]


def test_an_experts_number_is_written_without_zeros(hf):
    def change(tensors):
        tensors[EXPERT.format(1, "03") + "down_proj.bias"] = tensors.pop(
            EXPERT.format(1, 3) + "down_proj.bias"
        )

    text = refuses(hf, change, "1 unknown", "local_experts.03.down_proj.bias")
    assert "1 missing: down_proj.bias of layer 1's expert 3" in text


def test_dtypes_within_a_stack(hf):
    name = EXPERT.format(2, 1) + "gate_proj.weight"
    text = refuses(hf, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    first = EXPERT.format(2, 0) + "gate_proj.weight"
    kind = "to be stacked, but of different dtypes (save them in one)"
    assert text.splitlines()[1:] == [f"  1 {kind}: {name} is float16 but {first} is float32"]


def test_wrong_shapes(hf):
    def change(tensors):
        tensors[EXPERT.format(3, 1) + "down_proj.weight"] = np.ones((40, 64), np.float32)
        tensors["transformer.h.0.mlp.router.weight"] = np.ones((3, 64), np.float32)

    text = refuses(hf, change, "4 experts of feed-forward size 40")
    wanted = {
        EXPERT.format(3, 1) + "down_proj.weight [40, 64], expected [64, 40]",
        "transformer.h.0.mlp.router.weight [3, 64], expected [4, 64]",
    }
    assert text.splitlines()[1].startswith("  2 misshapen: ") and all(line in text for line in wanted)


def test_dense_and_moe_layers_in_one(hf):
    extra = {"transformer.h.0.mlp.gate_proj.weight": np.ones((40, 64), np.float32)}
    text = refuses(hf, lambda tensors: tensors.update(extra))
    assert "transformer.h.0.mlp.gate_proj.weight" in text and ".mlp.local_experts." in text


def test_dense_and_moe_layers_in_one_on_the_other_side(ms):
    def change(tensors):
        for leaf in ("w1.weight", "w2.weight", "w3.weight"):
            stack = tensors.pop(STACK.format(3) + leaf)
            tensors[f"model.layers.3.feed_forward.{leaf}"] = stack[0]

    refuses(ms, change, "model.layers.3.feed_forward.w", ".feed_forward.ffn.w")


def test_more_experts_than_tensors(hf):
    def change(tensors):
        for layer in range(4):
            tensors[f"transformer.h.{layer}.mlp.router.weight"] = np.ones((1000, 64), np.float32)

    refuses(hf, change, 1000, 95)


@pytest.mark.parametrize("said", [8, 1, 0, 10**12])
@pytest.mark.parametrize("side", ["hf", "ms"])
def test_a_config_that_says_otherwise(tmp_path, said, side):
    write_hf_folder(tmp_path / "hf", MOE, seed=1)
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    file = tmp_path / side / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": said}))
    words = f"{said} experts" if said > 1 else "a dense model"
    refuses(tmp_path / side, lambda _: None, words, "4 experts")


@pytest.mark.parametrize("said", [16, 10**12])
def test_a_config_of_experts_and_nothing_of_them(tmp_path, said):
    write_hf_folder(tmp_path / "hf", MOE | {"num_experts": 4}, seed=1)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": said}))
    refuses(
        tmp_path / "hf",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mlp." in name],
        27,
        "ffn",
    )


def test_a_config_of_experts_beside_a_dense_model(tmp_path):
    write_hf_folder(tmp_path / "hf", {}, seed=1)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"moe_config": {"expert_num": 16}}))
    refuses(tmp_path / "hf", lambda _: None, "16 experts", "dense")


@pytest.mark.parametrize(
    "spelled",
    [
        {"num_experts": 4},
        {"expert_num": 4},
        {"num_local_experts": 4},
        {"moe_num_experts": 4},
        {"moe_config": {"expert_num": 4, "num_experts_chosen": 2}},
        {"moe_config": {"num_experts_chosen": 2}},  # says nothing of their number: the tensors do
        {"some_other_key": 4},
    ],
)
def test_every_spelling_in_the_config(tmp_path, spelled):
    write_hf_folder(tmp_path / "hf", MOE, seed=1)
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    del config["num_experts"]
    file.write_text(json.dumps(config | spelled))
    convert_to_mindspore(tmp_path / "hf", tmp_path / "ms")
    _, router, _ = stored_tensors(tmp_path / "ms")["model.layers.0.feed_forward.router.dense.weight"]
    assert router[0] == 4
    if "some_other_key" not in spelled and spelled != {"moe_config": {"num_experts_chosen": 2}}:
        file.write_text(json.dumps(config | json.loads(json.dumps(spelled).replace("4", "5"))))
        refuses(tmp_path / "hf", lambda _: None, "5 experts", "4 experts")


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"num_experts": "16"}, "num_experts = '16'"),
        ({"num_experts": -1}, "num_experts = -1"),
        ({"moe_config": [16]}, "moe_config = [16]"),
        ({"moe_config": {"expert_num": True}}, "expert_num = True"),
    ],
)
def test_a_config_of_experts_that_cannot_be(tmp_path, change, value):
    write_hf_folder(tmp_path / "hf", {}, seed=1)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refuses(tmp_path / "hf", lambda _: None, value)


@pytest.mark.parametrize("leaves", [("w1", "w2", "w3"), ("w1",), ("w2",), ("w3",)])
def test_the_transposed_layout_of_grouped_matmul(ms, leaves):
    def change(tensors):
        for layer in range(4):
            for leaf in leaves:
                name = STACK.format(layer) + f"{leaf}.weight"
                tensors[name] = tensors[name].transpose(0, 2, 1)

    shapes = {"w1": ([4, 64, 40], "ffn, hidden"), "w2": ([4, 40, 64], "hidden, ffn")}
    found, expected = shapes["w2" if leaves == ("w2",) else "w1"]
    refuses(
        ms,
        change,
        "ffn.w",
        found,
        f"[experts, {expected}]",
        "convert_gmm.py",
    )


def test_a_stack_of_too_few_experts(ms):
    name = STACK.format(1) + "w2.bias"
    text = refuses(ms, lambda tensors: tensors.update({name: tensors[name][:, :3]}))
    assert text.splitlines()[1:] == [f"  1 misshapen: {name} [1, 3, 1, 64], expected [1, 4, 1, 64]"]


def test_a_stack_is_missing(ms):
    name = STACK.format(0) + "w1.weight"
    assert refuses(ms, without(name), "is not a").splitlines()[1:] == [f"  1 missing: {name}"]


def test_a_finite_value_beyond_the_dtype_is_named_by_its_stack(hf, ms, tmp_path):
    file = ms / "model.safetensors"
    tensors = load_file(file)
    tensors[STACK.format(1) + "w3.weight"][2, 5, 5] = 70000.0
    save_file(tensors, file)
    with refused("layers.1.feed_forward.ffn.w3.weight[2]", 70000.0):
        convert_to_torch(ms, tmp_path / "back", dtype="float16")
