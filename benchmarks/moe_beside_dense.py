"""CPU forward and backward pass of the expert block beside a dense block of as many active parameters.

    python benchmarks/moe_beside_dense.py [--rounds 15]

The block has 16 experts of width 384, of which each token goes to 4; the dense one is 1,536 wide. Each is one
graph on the same 2,048 tokens of 512 channels in fp32; both live in one process and take turns. Printed are
the medians and the median of the paired ratios, experts / dense, once dropless and once with a capacity.
"""

import argparse
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file from anywhere

from benchmarks.beside_oracle import graph_of, report  # noqa: E402

TOKENS, HIDDEN, EXPERTS, TOP_K, WIDTH = 2048, 512, 16, 4, 384
AIM = 1.5


def block_pass(width: int, moe_config: dict | None):
    """A function that runs one forward and backward pass, to the gradients of tokens and weights."""
    import mindspore as ms
    import numpy as np

    from research.telechat2.model.moe import TelechatMoE
    from research.telechat2.telechat_config import TelechatConfig
    from research.telechat2.telechat_layer import TelechatFeedForward

    config = TelechatConfig(
        hidden_size=HIDDEN, num_heads=8, intermediate_size=width, compute_dtype="float32",
        moe_config=moe_config,
    )  # fmt: skip
    block = (TelechatMoE if config.moe else TelechatFeedForward)(config)
    block.set_train(True)
    x, upstream = (
        ms.Tensor(np.random.default_rng(seed).standard_normal((TOKENS, HIDDEN), np.float32))
        for seed in (0, 1)
    )

    def loss(x, upstream):
        if config.moe is None:
            return (block(x) * upstream).sum()
        y, balance = block(x)
        return (y * upstream).sum() + balance.sum()

    step = graph_of(ms.ops.value_and_grad(loss, 0, ms.ParameterTuple(block.trainable_params())))

    def unit() -> float:
        start = time.perf_counter()
        value, (dx, grads) = step(x, upstream)
        for result in (value, dx, grads[0]):
            result.asnumpy()
        return time.perf_counter() - start

    return unit


def compare(rounds: int) -> None:
    """Print the ratios."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", jit_config={"jit_level": "O0"})
    experts = {"expert_num": EXPERTS, "num_experts_chosen": TOP_K, "aux_loss_types": ["expert"],
               "aux_loss_factors": [0.01]}  # fmt: skip
    dense = block_pass(TOP_K * WIDTH, None)
    for what, factor in (("dropless", 0.0), ("capacity 1.2", 1.2)):
        moe = block_pass(WIDTH, experts | {"capacity_factor": factor})
        moe(), dense(), moe(), dense()  # compiled, and warm
        pairs = [(moe(), dense()) for _ in range(rounds)]
        report(what, ("experts", "dense"), tuple(map(list, zip(*pairs, strict=True))))
    print(f"(aim: at most {AIM})")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):  # MindFormers writes where it runs
        compare(args.rounds)


if __name__ == "__main__":
    main()
