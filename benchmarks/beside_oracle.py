"""CPU training step and decode step beside the oracle at equal shapes, paired in one run.

    python benchmarks/beside_oracle.py [--rounds 9] [step | decode]

Ours and the oracle (transformers' LlamaForCausalLM with the same sizes, dtypes and thread count) live in a
process each and take turns, one timed unit at a time, so that a noisy machine is noisy for both. Printed are
the medians and the median of the paired ratios, ours / oracle: below 1 we are faster.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
SIZES = {"hidden": 512, "layers": 8, "heads": 8, "ffn": 1536, "vocab": 8192}
BATCH, SEQ, PROMPT, NEW_TOKENS = 4, 512, 32, 64


def our_step():
    """A function that runs one forward and backward pass of BATCH x SEQ tokens."""
    import mindspore as ms
    import numpy as np

    model = _our_model(use_past=False)
    model.set_train(True)
    ids = ms.Tensor(np.random.default_rng(0).integers(4, SIZES["vocab"], (BATCH, SEQ + 1)), ms.int32)
    step = graph_of(ms.ops.value_and_grad(model, None, ms.ParameterTuple(model.trainable_params())))

    def unit():
        loss, grads = step(ids, ids)
        loss.asnumpy()
        grads[0].asnumpy()

    return unit


def graph_of(function):
    """``function`` as a cell: compiled as one graph, as MindFormers' training step is."""
    from mindspore import nn

    class Graph(nn.Cell):
        def __init__(self):
            super().__init__()
            self.function = function

        def construct(self, *inputs):
            return self.function(*inputs)

    return Graph()


def our_decode():
    """A function that generates NEW_TOKENS after a prompt of PROMPT tokens, timing what follows the first."""
    import numpy as np

    model = _our_model(use_past=True)
    prompt = np.random.default_rng(0).integers(4, SIZES["vocab"], (1, PROMPT)).tolist()
    return _timed_generate(
        lambda **kw: model.generate(
            prompt, do_sample=False, eos_token_id=[-1], max_new_tokens=NEW_TOKENS, **kw
        )
    )


def _our_model(use_past):
    import mindspore as ms

    from research.telechat2.telechat import TelechatForCausalLM
    from research.telechat2.telechat_config import TelechatConfig

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", jit_config={"jit_level": "O0"})
    return TelechatForCausalLM(
        TelechatConfig(
            hidden_size=SIZES["hidden"], num_layers=SIZES["layers"], num_heads=SIZES["heads"],
            intermediate_size=SIZES["ffn"], vocab_size=SIZES["vocab"], seq_length=SEQ,
            compute_dtype="float32", use_past=use_past, is_dynamic=False,
        )
    )  # fmt: skip


def oracle_step():
    """As ``our_step``, by the oracle."""
    import torch

    model = _oracle_model().train()
    ids = torch.randint(4, SIZES["vocab"], (BATCH, SEQ + 1))

    def unit():
        model.zero_grad()
        logits = model(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    return unit


def oracle_decode():
    """As ``our_decode``, by the oracle."""
    import torch

    model = _oracle_model().eval()
    ids = torch.randint(4, SIZES["vocab"], (1, PROMPT))
    return _timed_generate(
        lambda **kw: model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
            max_new_tokens=NEW_TOKENS, **kw,
        )
    )  # fmt: skip


def _oracle_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count())
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SIZES["hidden"], num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"], intermediate_size=SIZES["ffn"],
            vocab_size=SIZES["vocab"], max_position_embeddings=SEQ, attention_bias=True, mlp_bias=True,
        )
    )  # fmt: skip


def _timed_generate(generate):
    from research.telechat2.generation.answer import Clock

    def unit():
        clock = Clock()
        generate(streamer=clock)
        return (clock.total() - clock.first()) / (NEW_TOKENS - 1)

    return unit


def serve(name: str, pipe: int) -> None:
    """Time one unit for each line on stdin, and answer with the seconds on the pipe.

    A unit that returns seconds has timed itself: a part of its work.
    """
    unit = globals()[name]()
    out = os.fdopen(pipe, "w")
    unit(), unit()
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        own = unit()
        whole = time.perf_counter() - start
        print(whole if own is None else own, file=out, flush=True)


def start(name: str, scratch: str):
    """A process that times units of ``name`` on demand, and the file its answers come in."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--serve", name, str(write)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
        pass_fds=(write,), cwd=scratch, env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    os.close(write)
    answers = os.fdopen(read)
    if answers.readline() != "ready\n":
        raise SystemExit(f"{name} did not start; run it alone: {Path(__file__).name} --serve {name} 1")
    return process, answers


def compare(what: str, rounds: int, scratch: str) -> None:
    """Print medians and paired ratio of ``what``: "step" or "decode"."""
    sides = [start(f"{side}_{what}", scratch) for side in ("our", "oracle")]
    times = ([], [])
    for _ in range(rounds):
        for (process, answers), seconds in zip(sides, times, strict=True):
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds.append(float(answers.readline()))
    for process, _ in sides:
        process.stdin.close()
        process.wait()
    report(what, ("ours", "oracle"), times)


def report(what: str, names: tuple[str, str], times: tuple[list[float], list[float]]) -> None:
    """Print the medians of two sides' seconds, and the median of the ratios of their paired rounds."""
    first, second = (statistics.median(seconds) for seconds in times)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    print(
        f"{what}: {names[0]} {first * 1e3:.1f} ms, {names[1]} {second * 1e3:.1f} ms, "
        f"ratio {statistics.median(ratios):.2f} "
        f"(paired, {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("step", "decode"), help="what to time; both by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], int(args.serve[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for what in [args.what] if args.what else ["step", "decode"]:
            compare(what, args.rounds, scratch)


if __name__ == "__main__":
    main()
