"""The preprocessor beside plain SentencePiece on the same text, paired in one run.

    python benchmarks/preprocess_speed.py --vocab_file_path tokenizer.model --input 'data/*.jsonl'

Each round runs, one after the other and each in a process of its own: SentencePiece alone on the texts of the
corpus, already parsed, one after the other in a loop and as one list; then the whole preprocessor (read,
parse, render, encode, shuffle, pack, write) with one worker and with two. MB are those of the texts as UTF-8,
the same for all. Printed are the medians of MB/s by the clock and by the processor time of all processes
involved, and of the paired ratios; with two workers also which part of that time the main process took, which
bounds what more workers can gain. Imports (MindSpore's takes a second or two) are not timed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
CONTENDERS = ("loop", "list", "1", "2")


def texts_of(corpus: str) -> list[str]:
    """All texts that the preprocessor has to encode, special tokens left out."""
    from research.telechat2.data import formats, sources

    texts = []
    for file in sources.input_files(corpus):
        for _, line in formats.read_lines(file):
            _, parsed = formats.parse(line)
            texts += [segment.text for segment in parsed.render() if not segment.special]
    return texts


def measure(contender: str, corpus: str, vocab_file: str, folder: str) -> dict:
    """Run one contender; return its seconds by the clock and of processor time."""
    imported = {"clock": 0.0, "processor": 0.0}
    if contender in ("loop", "list"):
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        texts = texts_of(corpus)

        def work():
            if contender == "list":
                model.encode(texts, num_threads=1)
            else:
                for text in texts:
                    model.encode(text)
    else:
        import tqdm  # noqa: F401

        from research.telechat2.data import writing
        from research.telechat2.data.job import Options
        from research.telechat2.data.preparing import prepare

        write_records = writing.write_records

        def after_import(*arguments):
            began, before = time.perf_counter(), processor_seconds()
            import mindspore.mindrecord  # noqa: F401

            imported["clock"] = time.perf_counter() - began
            imported["processor"] = processor_seconds()[0] - before[0]
            write_records(*arguments)

        writing.write_records = after_import

        def work():
            prepare(corpus, vocab_file, folder, Options(), workers=int(contender))

    began, before = time.perf_counter(), processor_seconds()
    work()
    clock = time.perf_counter() - began - imported["clock"]
    main, children = (after - b for after, b in zip(processor_seconds(), before, strict=True))
    main -= imported["processor"]
    return {"clock": clock, "processor": main + children, "main": main}


def processor_seconds() -> list[float]:
    """Of this process, and of those it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return [usage.ru_utime + usage.ru_stime for usage in usages]


def in_process(contender: str, corpus: Path, vocab_file: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--contender", contender, "--input", str(corpus)]
    command += ["--vocab_file_path", vocab_file, "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "GLOG_v": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def make_corpus(given: list[str], megabytes: float, target: Path) -> None:
    """Repeat the lines of the given files until there are so many megabytes of them."""
    from research.telechat2.data import sources

    lines = [
        line
        for path in given
        for file in sources.input_files(path)
        for line in file.read_bytes().splitlines()
    ]
    size, number = 0, 0
    with open(target, "wb") as file:
        while size < megabytes * 1e6:
            size += file.write(lines[number % len(lines)] + b"\n")
            number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, nargs="+", help="jsonl files to make the corpus of")
    parser.add_argument("--vocab_file_path", required=True)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.input[0], args.vocab_file_path, args.output)))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        make_corpus(args.input, args.megabytes, corpus)
        megabytes = sum(len(text.encode()) for text in texts_of(str(corpus))) / 1e6
        print(f"{megabytes:.1f} MB of text in {corpus.stat().st_size / 1e6:.1f} MB of jsonl")
        rounds = []
        for number in range(args.rounds):
            rounds.append(
                {
                    name: in_process(name, corpus, args.vocab_file_path, Path(folder) / f"{number}-{name}")
                    for name in CONTENDERS
                }
            )
            show(rounds[-1:], megabytes)
        print("medians")
        show(rounds, megabytes)


def show(rounds: list[dict], megabytes: float) -> None:
    for name in CONTENDERS:
        parts = []
        for kind in ("clock", "processor"):
            speed = statistics.median(megabytes / r[name][kind] for r in rounds)
            ratios = [
                f"{statistics.median(r[other][kind] / r[name][kind] for r in rounds):.2f} of {other}"
                for other in CONTENDERS[: CONTENDERS.index(name)]
            ]
            parts.append(f"{kind} {speed:5.2f} MB/s ({', '.join(ratios) or '-'})")
        main = statistics.median(r[name]["main"] / r[name]["processor"] for r in rounds)
        print(f"  {name:5}", "; ".join([*parts, f"main process {main:.0%}"]), flush=True)


if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)
    main()
