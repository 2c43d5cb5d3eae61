"""CPU prediction beside the oracle at equal shapes: tokens/s, and time to first token, paired in one run.

    python benchmarks/decode_beside_oracle.py [--rounds 5] [--batches 1 8 32]

Ours with a graph for each length (fixed), ours with one graph for all (dynamic), and transformers on torch
answer the same prompts in turns, each in a process of its own, so that a noisy machine is noisy for all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import beside_oracle as shapes

NAMES = ("fixed", "dynamic", "oracle")


def generator(name: str):
    """A function of a batch size that answers so many prompts, and returns seconds to first and per token."""
    import numpy as np

    from research.telechat2.generation.answer import Clock

    if name == "oracle":
        import torch

        model = shapes._oracle_model().eval()
    else:
        model = shapes._our_model(use_past=True)
        model.config.is_dynamic = name == "dynamic"
        if model.config.is_dynamic:
            model.set_dynamic_inputs()

    def answer(batch: int) -> tuple[float, float]:
        rows = np.random.default_rng(0).integers(4, shapes.SIZES["vocab"], (batch, shapes.PROMPT))
        settings = {"do_sample": False, "max_new_tokens": shapes.NEW_TOKENS, "streamer": (clock := Clock())}
        if name == "oracle":
            ids = torch.tensor(rows)
            settings |= {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
            model.generate(ids, **settings)
        else:
            model.generate(rows.tolist(), eos_token_id=[-1], **settings)
        return clock.first(), (clock.total() - clock.first()) / (shapes.NEW_TOKENS - 1)

    return answer


def serve(name: str, pipe: int) -> None:
    """Answer batch sizes on stdin by seconds on the pipe."""
    answer, out = generator(name), os.fdopen(pipe, "w")
    for line in sys.stdin:
        print(json.dumps(answer(int(line))), file=out, flush=True)


def start(name: str, scratch: str):
    """A process that answers, and a function that asks it."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--serve", name, str(write)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
        pass_fds=(write,), cwd=scratch, env=os.environ | {"PYTHONPATH": str(shapes.CHECKOUT)},
    )  # fmt: skip
    os.close(write)
    answers = os.fdopen(read)

    def ask(batch: int) -> list[float]:
        process.stdin.write(f"{batch}\n")
        process.stdin.flush()
        line = answers.readline()
        if not line:
            raise SystemExit(f"{name} ended; run it alone: {Path(__file__).name} --serve {name} 1")
        return json.loads(line)

    return process, ask


def compare(batches: list[int], rounds: int, scratch: str) -> None:
    """Print medians of all sides, and the medians of the paired ratios to the oracle's."""
    sides = [start(name, scratch) for name in NAMES]
    for batch in batches:
        for _, ask in sides:
            ask(batch)  # compiles
        found = [[ask(batch) for _, ask in sides] for _ in range(rounds)]
        for i, name in enumerate(NAMES):
            first, each = (statistics.median(round[i][k] for round in found) for k in (0, 1))
            slower = statistics.median(round[i][1] / round[2][1] for round in found)
            later = statistics.median(round[i][0] / round[2][0] for round in found)
            print(
                f"batch {batch:2d}, {name:7s}: {batch / each:7.1f} tokens/s ({slower:.2f} times the oracle's "
                f"time), first token after {first * 1e3:6.1f} ms ({later:.2f} times)",
                flush=True,
            )
    for process, _ in sides:
        process.stdin.close()
        process.wait()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], int(args.serve[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(args.batches, args.rounds, scratch)


if __name__ == "__main__":
    main()
