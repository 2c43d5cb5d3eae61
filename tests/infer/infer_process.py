"""One of several CPU processes that share a model: ``cases.json`` in a folder becomes ``rank_N.npz``.

A process loads its part of a Hugging Face folder, and compares it with what it cuts itself of the same
model's ``<name>.npz``, as the training model has it: written from the published layout without our table.
"""

import json
import sys
from pathlib import Path

import numpy as np

PAD = 3
NO_WEIGHTS = ("_cache", "expert_load")


def part(name: str, whole: np.ndarray, sizes: dict, size: int, rank: int) -> np.ndarray:
    """What rank ``rank`` of ``size`` has of a tensor of the training model."""

    def cut(axis: int) -> np.ndarray:
        return np.split(whole, size, axis)[rank]

    if name.endswith(("norm.weight", "norm_out.weight", "bias", "router.dense.weight")):
        return whole
    if name.endswith(("wo.weight", "w2.weight")):
        return cut(-1)  # their input is shared
    if ".ffn." in name:
        return cut(1)  # [E, F, H]
    return cut(0)  # wk_v's rows lie head after head, so a part of them are whole heads


def joined(weights: dict, sizes: dict) -> dict:
    """A rank's weights with the rows of one input in one matrix: queries, keys, values; gate, up."""
    found = dict(weights)
    for name in weights:
        prefix, _, kind = name.rpartition("attention.")
        if kind == "wk_v.weight":
            width = sizes["hidden_size"] // sizes["num_heads"]
            key_value = found.pop(name)
            heads = key_value.reshape(-1, 2, width, key_value.shape[1])
            rows = [heads[:, i].reshape(-1, key_value.shape[1]) for i in (0, 1)]
            query = found.pop(prefix + "attention.wq.weight")
            found[prefix + "attention.w_qkv.weight"] = np.concatenate([query, *rows])
        if name.endswith("feed_forward.w1.weight"):
            prefix = name.removesuffix("w1.weight")
            rows = [found.pop(prefix + kind) for kind in ("w1.weight", "w3.weight")]
            found[prefix + "w_gate_hidden.weight"] = np.concatenate(rows)
    return found


def build(case: dict, weights: dict, size: int, rank: int, **more):
    """The rank's model of a case, loaded from its folder; every parameter is what ``weights`` say."""
    from mindspore.nn.utils import no_init_parameters

    from research.telechat2.infer.telechat import ParallelTelechatForCausalLM
    from research.telechat2.telechat_config import TelechatConfig

    sizes = case["config"]
    plan = {"model_parallel": size, "vocab_emb_dp": False}
    with no_init_parameters():
        model = ParallelTelechatForCausalLM(TelechatConfig(**(sizes | more), parallel_config=plan))
    model.load_weights(case["folder"])
    own = {name: part(name, whole, sizes, size, rank) for name, whole in weights.items()}
    if sizes.get("qkv_concat"):
        own = joined(own, sizes)
    found = {p.name: p.asnumpy() for p in model.get_parameters() if not p.name.endswith(NO_WEIGHTS)}
    assert found.keys() == own.keys()
    for name, array in own.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    return model.set_train(False)


def answer(model, rows: list[list[int]], new_tokens: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Greedy answers to a batch, prompts included, and the logits of every step ``[steps, B, V]``."""
    longest = max(map(len, rows))
    padded = [row + [PAD] * (longest - len(row)) for row in rows]
    found = model.generate(
        padded, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[-1], pad_token_id=PAD,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return found["sequences"], np.stack([np.asarray(logits) for logits in found["logits"]])


def answers(cases: list[dict], weights: dict[str, dict], size: int, rank: int) -> dict:
    """What a rank finds in all cases: the rows' tokens and the steps' logits, by case and batch."""
    found = {}
    for case in cases:
        model = build(case, weights[case["weights"]], size, rank)
        for i, rows in enumerate(case["batches"]):
            tokens, logits = answer(model, rows, case["new_tokens"])
            found[f"{case['name']}/{i}/logits"] = logits
            found |= {f"{case['name']}/{i}/{j}": row for j, row in enumerate(tokens)}
    return found


def main() -> None:
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", jit_config={"jit_level": "O0"})
    ms.communication.init()
    size, rank = ms.communication.get_group_size(), ms.communication.get_rank()
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    weights = {case["weights"]: dict(np.load(folder / f"{case['weights']}.npz")) for case in cases}
    np.savez(folder / f"rank_{rank}.npz", **answers(cases, weights, size, rank))


if __name__ == "__main__":
    main()
