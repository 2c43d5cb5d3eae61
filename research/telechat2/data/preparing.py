"""From jsonl to a training set; ``telechat_preprocess.py`` calls it.

    sources -> batches of lines -> tokens (workers) -> spool on the disk -> shuffled buckets -> records

Two passes: the first reads and encodes every line once; the second packs and writes. Each leaves finished
parts on the disk (segments of the spool, MindRecord files), and everything that is drawn by lot is drawn from
the seed and the part's number: so a run that was stopped continues at the last finished part, and gives the
bytes it would have given.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from research.telechat2.common.cli import quiet_libraries
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import write_json
from research.telechat2.data import engines, html_report, manifests, packing, sources, spool, writing
from research.telechat2.data.encoding import Encoded
from research.telechat2.data.job import Job, Options, Part, vocabulary_of_data
from research.telechat2.data.spool import Spool, Totals
from research.telechat2.text import prompt_format
from research.telechat2.text.vocabulary import TokenArray

if TYPE_CHECKING:
    from tqdm import tqdm

_SHUFFLE_STREAM = 3  # of random numbers


def prepare(
    inputs: str | Path | list[str | Path],
    vocab_file: str | Path,
    output_path: str | Path,
    options: Options,
    *,
    workers: int | None = None,
    engine: str = "processes",
    resume: bool = False,
    report: str = "",
) -> dict[str, Any]:
    """Turn conversations and texts into records of ``max_length + 1`` tokens; return the manifest.

    ``workers``: None for as many as there are cores, of the cluster with "ray". ``resume``: continue a run
    that was stopped, or begin when there is none. ``report``: language of a report page, "" for none.

    UsageError for wrong options or inputs, refused lines, an empty data set, an output that exists, and a
    stopped run when ``resume`` is not set or its options differ.
    """
    options.check()
    engines.check(engine, workers)
    target = writing.output_file(output_path)
    folder = writing.partial_folder(target)
    is_made = (folder / "moves.json").is_file()
    if not is_made:
        writing.check_absent(target)
    paths = inputs if isinstance(inputs, list) else [inputs]
    job = Job(options, sources.find(paths), Path(vocab_file), vocabulary_of_data(vocab_file), target, folder)
    created = _enter(job, resume)
    with writing.locked(folder):
        if not is_made:
            try:
                _make(job, workers, engine, report)
            except UsageError:
                _leave(job, created)
                raise
            except KeyboardInterrupt:
                print("stopped; the same command with --resume continues", file=sys.stderr)
                raise
        inside = prompt_format.manifest_path(folder / target.name)
        manifest = json.loads(
            (inside if inside.is_file() else prompt_format.manifest_path(target)).read_text(encoding="utf-8")
        )
        writing.publish(folder, target)
    return {"output": str(manifests.output_of(manifest, target)), **manifest}


def _enter(job: Job, resume: bool) -> list[Path]:
    """Make the folder of the run, or check that the one there is of a run with the same inputs.

    Returns the parents that were made for it.
    """
    job_file = job.folder / "job.json"
    described = manifests.describe_job(job)
    created = [parent for parent in job.folder.parents if not parent.exists()]
    if not job.folder.exists():
        job.folder.mkdir(parents=True)
        write_json(job_file, described)
        return created
    if not resume:
        remedy = "continue it with --resume, or delete the folder"
        raise UsageError(f"{job.folder} exists: a run writes there or was interrupted; {remedy}")
    before = json.loads(job_file.read_text(encoding="utf-8")) if job_file.is_file() else described
    if different := [key for key in described if before.get(key) != described[key]]:
        found = f"{job.folder} is of a run with another {' and another '.join(different)}"
        raise UsageError(f"{found}; repeat the command of that run, or delete the folder")
    if not job_file.is_file():
        write_json(job_file, described)
    return []


def _leave(job: Job, created: list[Path]) -> None:
    """Delete what a run made whose inputs or options must change: nothing of it can be continued."""
    shutil.rmtree(job.folder)
    for parent in created:
        with suppress(OSError):  # others may have put something there meanwhile
            parent.rmdir()


def _make(job: Job, workers: int | None, engine: str, report: str) -> None:
    """Fill the run's folder with all that is to be moved out."""
    text_bytes = sum(source.text_bytes() * source.weight for source in job.found)
    store = Spool(job.folder, text_bytes, job.options.seed)
    totals, files = _encode(job, store, workers, engine)
    manifests.check_totals(totals, job.found, complete=True)
    parts = _write_parts(job, store, totals)
    manifest = manifests.manifest(job, totals, files, parts)
    for name, content in manifests.with_parts(job.target.name, manifest).items():
        write_json(prompt_format.manifest_path(job.folder / name), content)
    if report:
        page = writing.report_file(job.folder / job.target.name)
        html_report.write(page, manifest, store, job.vocabulary, report)
    write_json(job.folder / "moves.json", manifests.moves(job.target, manifest))


# ---------------------------------------------------------------------- first pass
def _encode(
    job: Job, store: Spool, workers: int | None, engine: str
) -> tuple[Totals, list[sources.FileState]]:
    """Encode all lines into the spool, from its last segment on; return the counts and the files read."""
    totals = store.reopen()
    done = job.folder / "files.json"
    if done.is_file():
        return totals, [sources.FileState(*state) for state in json.loads(done.read_text(encoding="utf-8"))]
    files: list[sources.FileState] = []
    with _progress("encode", sum(source.path.stat().st_size for source in job.found), "B") as bar:
        done_batches = store.segments * spool.SEGMENT_BATCHES
        batches = sources.read_batches(job.found, files, done_batches, bar.update)
        useful = sum(-(-source.text_bytes() // sources.BATCH_BYTES) for source in job.found)
        encoding = engines.encode_all(batches, job.vocabulary, job.options, engine, workers, useful)
        with closing(encoding) as encoded:
            while group := list(islice(_counted(encoded, bar), spool.SEGMENT_BATCHES)):
                segment = store.write(group)
                totals.add(segment.counts, segment.problems)
                manifests.check_totals(totals, job.found, complete=False)
    write_json(done, files)
    return totals, files


def _counted(encoded: Iterable[Encoded], bar: "tqdm[Any]") -> Iterator[Encoded]:
    """Pass batches on, and show how many tokens a second they make."""
    tokens = 0
    for batch in encoded:
        tokens += len(batch.tokens)
        elapsed = bar.format_dict["elapsed"] or 1
        bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)
        yield batch


# ---------------------------------------------------------------------- second pass
def _write_parts(job: Job, store: Spool, totals: Totals) -> list[Part]:
    """Pack and write all records; parts that an interrupted run finished are kept."""
    quiet_libraries()
    capacity = job.options.capacity
    per_file = job.options.records_per_file
    expected = totals.counts["totals"]["tokens"] // capacity + 1
    if per_file is None and expected * capacity * 8 > writing.FILE_BYTES:
        per_file = max(1, writing.FILE_BYTES // (capacity * 8))
    records = _shuffled(store, capacity, job.options.seed)
    parts: list[Part] = []
    with _progress("write", expected, " records") as bar:
        for first in records:
            target = job.target if per_file is None else writing.numbered_file(job.target, len(parts))
            rest = records if per_file is None else islice(records, per_file - 1)
            parts.append(_part(job.folder / target.name, chain([first], rest), job, bar))
    return parts


def _part(path: Path, records: Iterator[list[TokenArray]], job: Job, bar: "tqdm[Any]") -> Part:
    finished = path.with_name(f"{path.name}.done")
    if finished.is_file():
        bar.update(sum(1 for _ in records))
        return Part(*json.loads(finished.read_text(encoding="utf-8")))
    sizes: list[int] = []
    documents: list[int] = []

    def filled() -> Iterator[writing.Record]:
        for pieces in records:
            record = writing.fill_record(pieces, job.options.capacity, job.vocabulary.pad_id)
            sizes.append(sum(map(len, pieces)))
            documents.append(writing.count_documents(record["input_ids"], job.vocabulary.start_ids))
            yield record

    writing.write_records(path, filled(), bar.update)
    part = Part(path.name, len(sizes), sum(sizes), max(documents))
    write_json(finished, part)
    return part


def _shuffled(store: Spool, capacity: int, seed: int) -> Iterator[list[TokenArray]]:
    for bucket in range(store.buckets):
        for number, (tokens, lengths, _) in enumerate(store.windows(bucket)):
            rng = np.random.default_rng([seed, _SHUFFLE_STREAM, bucket, number])
            yield from packing.records(tokens, lengths, capacity, rng)


def _progress(what: str, total: int, unit: str) -> "tqdm[Any]":
    """A bar with rate and time left, on a terminal only."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=what, unit=unit, unit_scale=True, disable=None, dynamic_ncols=True, file=sys.stderr
    )
