"""How fast a checkpoint converts, beside ``cp`` of the same files on the same disk; and its peak memory.

A random model of 7B's widths in bfloat16 is written, in shards, as a release is. Then, in turn and each with
nothing of the source in the page cache: ``cp`` of the shards, and ``convert_weight.py`` into shards, which
also computes checksums, counts NaN, verifies, and puts everything on the disk. ``cp`` is timed twice over: as
it ends, with the last gigabytes still in memory, and when ``sync`` has put them on the disk too.

Run from anywhere: ``python benchmarks/convert_beside_copy.py FOLDER [--layers 30 --vocab_size 131072
--shards 8 --rounds 2]``; it needs room for twice the model (30 GB for 30 layers) and removes what it makes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL).returncode
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def shapes(layers: int, vocab_size: int, hidden: int = 4096, ffn: int = 12288) -> dict[str, tuple[int, ...]]:
    of_layer = {
        "input_layernorm.weight": (hidden,),
        "self_attention.query.weight": (hidden, hidden),
        "self_attention.key_value.weight": (2 * hidden, hidden),
        "self_attention.dense.weight": (hidden, hidden),
        "self_attention.dense.bias": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "mlp.down_proj.bias": (hidden,),
    }
    return {
        "transformer.word_embeddings.weight": (vocab_size, hidden),
        **{f"transformer.h.{i}.{name}": shape for i in range(layers) for name, shape in of_layer.items()},
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (vocab_size, hidden),
    }


def write_model(folder: Path, layers: int, vocab_size: int, shards: int) -> int:
    """Write it; returns its bytes. Tensors are ranges of one pool of normally distributed values."""
    import numpy as np

    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 25, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    tensors = shapes(layers, vocab_size)
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in tensors.items()}
    files: list[list[str]] = [[]]
    for name in tensors:
        if sum(sizes[held] for held in files[-1]) >= sum(sizes.values()) / shards:
            files.append([])
        files[-1].append(name)
    folder.mkdir(parents=True)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, begin = {}, 0
        for name in names:
            offsets = [begin, begin + sizes[name]]
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": offsets}
            begin = offsets[1]
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                left = sizes[name]
                while left:
                    start = 2 * int(rng.integers(0, len(pool) // 4))
                    left -= stream.write(memoryview(pool)[start : start + left])
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "telechat", "hidden_size": 4096, "n_layer": layers, "n_head": 32}
    config |= {"ffn_hidden_size": 12288, "vocab_size": vocab_size, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(sizes.values())


def forget(folder: Path) -> None:
    """Put files on the disk and take them out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed_copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of ``cp``, and of ``cp`` and ``sync``."""
    target.mkdir()
    began = time.monotonic()
    subprocess.run(["cp", *sorted(source.glob("*")), target], check=True)
    copied = time.monotonic() - began
    subprocess.run(["sync", *sorted(target.glob("*"))], check=True)
    return copied, time.monotonic() - began


def timed_conversion(source: Path, target: Path, *flags: str) -> tuple[float, int]:
    """Seconds of the command, from its start to its end, and the bytes that were resident at most."""
    peak = target.parent / "peak"
    script = CHECKOUT / "research" / "telechat2" / "convert_weight.py"
    command = [sys.executable, script, "--torch_path", source, "--mindspore_path", target]
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", MEASURED, peak, *command, *flags], check=True)
    return time.monotonic() - began, int(peak.read_text()) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab_size", type=int, default=131072)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max_shard_size", default="5GB")
    args = parser.parse_args()
    work = args.folder / f"convert_beside_copy_{os.getpid()}"
    try:
        nbytes = write_model(work / "hf", args.layers, args.vocab_size, args.shards)
        print(f"{nbytes / 1e9:.2f} GB in {args.shards} shards", flush=True)
        for _ in range(args.rounds):
            forget(work)
            copied, synced = timed_copy(work / "hf", work / "copy")
            shutil.rmtree(work / "copy")
            forget(work)
            flags = ("--max_shard_size", args.max_shard_size)
            seconds, peak = timed_conversion(work / "hf", work / "ms", *flags)
            shutil.rmtree(work / "ms")
            speeds = [nbytes / taken / 1e9 for taken in (copied, synced, seconds)]
            print("cp {:.2f} GB/s, with sync {:.2f}; conversion {:.2f}:".format(*speeds), end=" ")
            print(f"{copied / seconds:.0%} of cp, {synced / seconds:.0%} of cp with sync;", end=" ")
            print(f"peak resident {peak / 1e6:.0f} MB", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
