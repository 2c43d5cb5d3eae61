"""Who does the work: this process, others on this machine, or a Ray cluster. All give the same, in order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from research.telechat2.common.cli import interrupt_afterwards, quiet_libraries
from research.telechat2.common.errors import UsageError
from research.telechat2.data.encoding import Encoded, encode_batch
from research.telechat2.data.job import Options
from research.telechat2.data.sources import Batch
from research.telechat2.text.sentencepiece_vocabulary import SentencePieceVocabulary
from research.telechat2.text.vocabulary import Vocabulary

ENGINES = ("processes", "ray")
MOST_WORKERS = max(64, 8 * (os.cpu_count() or 1))  # more processes are a typing error
_AHEAD = 2  # batches per worker that are under way; more would only take memory
_Task = TypeVar("_Task")


def check(engine: str, workers: int | None) -> None:
    """UsageError for an engine that is unknown or not installed, and for too few workers or too many."""
    if engine not in ENGINES:
        raise UsageError(f"engine is {engine!r}; expected {' or '.join(ENGINES)}")
    if engine == "ray" and find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray; install it with: pip install -e '.[ray]'")
    if workers is not None and workers < 1:
        raise UsageError(f"workers are {workers}; expected at least 1")
    if engine == "processes" and workers and workers > MOST_WORKERS:
        cores = f"processes of a machine with {os.cpu_count()} cores"
        raise UsageError(f"workers are {workers:,} {cores}; expected at most {MOST_WORKERS}")


def encode_all(
    batches: Iterable[Batch],
    vocabulary: Vocabulary,
    options: Options,
    engine: str,
    workers: int | None,
    useful: int,
) -> Generator[Encoded, None, None]:
    """Encode batches with ``workers`` workers; yield the results in the order of the batches.

    ``batches`` is read a few ahead of what is yielded, so memory stays small. ``workers``: None for as many
    as there are cores; of processes there are no more than ``useful``. OSError when a worker dies.
    """
    if engine == "ray":
        return _with_ray(batches, vocabulary, options, workers)
    workers = max(1, min(workers or len(os.sched_getaffinity(0)), useful))
    if workers > 1:
        return _with_processes(batches, vocabulary, options, workers)
    return (encode_batch(batch, vocabulary, options) for batch in batches)


# ---------------------------------------------------------------------- processes
_state: tuple[Vocabulary, Options] | None = None  # of a worker process


def _start(vocabulary: Vocabulary, options: Options) -> None:
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = vocabulary, options


def _end_with_parent() -> None:
    """End a process of the pool when its parent is killed; else it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(batch: Batch) -> Encoded:
    assert _state is not None
    return encode_batch(batch, *_state)


def _with_processes(
    batches: Iterable[Batch], vocabulary: Vocabulary, options: Options, workers: int
) -> Generator[Encoded, None, None]:
    # Forked workers start at once, but of a process that has loaded MindSpore they would inherit its threads'
    # locks.
    context = multiprocessing.get_context("spawn" if "mindspore" in sys.modules else "fork")
    pool = ProcessPoolExecutor(workers, context, _start, (vocabulary, options))
    try:
        yield from _in_order(
            batches, workers, lambda batch: pool.submit(_work, batch), lambda future: future.result()
        )
    except BrokenProcessPool as error:
        remedy = "if memory ran out, continue with --resume and fewer --workers"
        raise OSError(f"a worker process died; {remedy}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    batches: Iterable[Batch],
    workers: int,
    submit: Callable[[Batch], _Task],
    result: Callable[[_Task], Encoded],
) -> Generator[Encoded, None, None]:
    under_way: deque[_Task] = deque()
    for batch in batches:
        under_way.append(submit(batch))
        if len(under_way) > _AHEAD * workers:
            yield result(under_way.popleft())
    while under_way:
        yield result(under_way.popleft())


# ---------------------------------------------------------------------- ray
def _with_ray(
    batches: Iterable[Batch], vocabulary: Vocabulary, options: Options, workers: int | None
) -> Generator[Encoded, None, None]:
    quiet_libraries()
    with interrupt_afterwards("MindSpore and Ray are loaded"):
        import mindspore.mindrecord  # noqa: F401  # after Ray it cannot be imported: their protobufs disagree
        import ray

    if not ray.is_initialized():  # the cluster that RAY_ADDRESS names, or a local one
        package = Path(__file__).resolve().parents[2]  # research/, sent along to the other machines
        environment = {"py_modules": [str(package)], "excludes": ["__pycache__"]}
        ray.init(log_to_driver=False, configure_logging=False, runtime_env=environment)
    workers = workers or int(ray.cluster_resources().get("CPU", 1))
    content = ray.put(vocabulary.content)
    work = ray.remote(num_cpus=1)(_work_in_ray)
    try:
        yield from _in_order(batches, workers, lambda batch: work.remote(batch, content, options), ray.get)
    except ray.exceptions.RayError as error:
        raise OSError(f"the Ray cluster failed: {error}; correct that, continue with --resume") from error


def _work_in_ray(batch: Batch, content: bytes, options: Options) -> Encoded:
    return encode_batch(batch, _vocabulary(content), options)


@lru_cache(maxsize=1)
def _vocabulary(content: bytes) -> Vocabulary:
    return SentencePieceVocabulary(content)
