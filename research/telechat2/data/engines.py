"""Who does the work: this process, others on this machine, or a Ray cluster. All give the same, in order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from research.telechat2.common.cli import interrupt_afterwards, quiet_libraries
from research.telechat2.common.errors import UsageError
from research.telechat2.data import encoding
from research.telechat2.data.encoding import Encoded, Settings
from research.telechat2.data.sources import Batch
from research.telechat2.text.sentencepiece_vocabulary import SentencePieceVocabulary
from research.telechat2.text.vocabulary import Vocabulary

ENGINES = ("processes", "ray")
_AHEAD = 2  # batches per worker that are under way; more would only take memory


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def encode_all(
    batches: Iterable[Batch], vocabulary: Vocabulary, settings: Settings, workers: int, engine: str
) -> Iterator[Encoded]:
    """Encode batches with ``workers`` workers; yield the results in the order of the batches.

    ``batches`` is read a few ahead of what is yielded, so memory stays small. OSError when a worker dies.
    """
    if engine == "ray":
        yield from _with_ray(batches, vocabulary, settings, workers)
    elif workers == 1:
        for batch in batches:
            yield encoding.encode_batch(batch, vocabulary, settings)
    else:
        yield from _with_processes(batches, vocabulary, settings, workers)


# ---------------------------------------------------------------------- processes
_state: tuple[Vocabulary, Settings] | None = None  # of a worker process


def _start(vocabulary: Vocabulary, settings: Settings) -> None:
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = vocabulary, settings


def _end_with_parent() -> None:
    """A pool's processes would outlive a parent that is killed, and wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(batch: Batch) -> Encoded:
    return encoding.encode_batch(batch, *_state)


def _with_processes(batches, vocabulary: Vocabulary, settings: Settings, workers: int) -> Iterator[Encoded]:
    # Forked workers start at once, but of a process that has loaded MindSpore they would inherit its threads'
    # locks.
    context = multiprocessing.get_context("spawn" if "mindspore" in sys.modules else "fork")
    pool = ProcessPoolExecutor(workers, context, _start, (vocabulary, settings))
    try:
        yield from _in_order(
            batches, _AHEAD * workers, lambda batch: pool.submit(_work, batch), lambda future: future.result()
        )
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process died, perhaps for want of memory; continue with --resume, "
            "and with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(batches: Iterable, ahead: int, submit: Callable, result: Callable) -> Iterator[Encoded]:
    under_way: deque = deque()
    for batch in batches:
        under_way.append(submit(batch))
        if len(under_way) > ahead:
            yield result(under_way.popleft())
    while under_way:
        yield result(under_way.popleft())


# ---------------------------------------------------------------------- ray
def _with_ray(batches, vocabulary: Vocabulary, settings: Settings, workers: int) -> Iterator[Encoded]:
    ray = _ray()
    content = ray.put(vocabulary.content)
    work = ray.remote(num_cpus=1)(_work_in_ray)
    try:
        yield from _in_order(
            batches, _AHEAD * workers, lambda batch: work.remote(batch, content, settings), ray.get
        )
    except ray.exceptions.RayError as error:
        raise OSError(
            f"the Ray cluster could not do its work: {error}; mend that, and continue with --resume"
        ) from error


def _work_in_ray(batch: Batch, content: bytes, settings: Settings) -> Encoded:
    return encoding.encode_batch(batch, _vocabulary(content), settings)


@lru_cache(maxsize=1)
def _vocabulary(content: bytes) -> Vocabulary:
    return SentencePieceVocabulary(content)


def check(engine: str) -> None:
    """UsageError for an engine that is unknown or not installed."""
    if engine not in ENGINES:
        raise UsageError(f"engine is {engine!r}; expected {' or '.join(ENGINES)}")
    if engine == "ray" and find_spec("ray") is None:
        raise UsageError(
            "--engine ray needs Ray, which is not installed; install it with: pip install -e '.[ray]'"
        )


def ray_cores() -> int:
    """How many cores the Ray cluster has; joins the one that RAY_ADDRESS names, or starts a local one."""
    return int(_ray().cluster_resources().get("CPU", 1))


def _ray():
    quiet_libraries()
    with interrupt_afterwards("MindSpore and Ray are loaded"):
        import mindspore.mindrecord  # noqa: F401  # after Ray it cannot be imported: their protobufs disagree
        import ray

    if not ray.is_initialized():
        package = Path(__file__).resolve().parents[2]  # research/, sent along to the other machines
        ray.init(
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"py_modules": [str(package)], "excludes": ["__pycache__"]},
        )
    return ray
