"""The manifest of a data set: what went in and what came of it; and when that is not to be written."""

from pathlib import Path
from typing import Any

from research.telechat2.common.errors import UsageError
from research.telechat2.data import formats, writing
from research.telechat2.data.encoding import TOO_LONG, Problem
from research.telechat2.data.job import Job, Part, ignored_fields
from research.telechat2.data.same_vocabulary import sha256
from research.telechat2.data.sources import FileState, Source
from research.telechat2.data.spool import Totals
from research.telechat2.text import prompt_format

Manifest = dict[str, Any]
_NAMED_LINES = 10  # so many bad lines are listed in an error


def describe_job(job: Job) -> dict[str, object]:
    """What must be the same for an interrupted run to be continued."""
    inputs: list[list[object]] = []
    for source in job.found:
        stat = source.path.stat()
        inputs.append([str(source.path.resolve()), stat.st_size, stat.st_mtime_ns, source.weight])
    return {"options": job.options._asdict(), "tokenizer": sha256(job.vocab_file), "inputs": inputs}


def with_parts(name: str, manifest: Manifest) -> dict[str, Manifest]:
    """Return the manifest of each file by the file's name: numbered files have short ones of their own."""
    shared = ("prompt_format", "max_length", "tokenizer", "document_start_ids", "documents_per_record")
    short = {key: manifest[key] for key in shared}
    parts = {part["name"]: {**short, **part, "part_of": name} for part in manifest["files"]}
    return {**parts, name: manifest}


def moves(target: Path, manifest: Manifest) -> list[str]:
    """The files of a data set in the order in which they get their place; its manifest is the last."""
    parts = [part["name"] for part in manifest["files"]]
    return [
        *(file for part in parts for file in (f"{part}.db", part)),
        writing.report_file(target).name,
        *(prompt_format.manifest_path(name).name for name in with_parts(target.name, manifest)),
    ]


def output_of(manifest: Manifest, target: Path) -> Path:
    """Return what a training run is given: the file, or the folder of the numbered ones."""
    return target if manifest["files"][0]["name"] == target.name else target.parent


def check_totals(totals: Totals, found: list[Source], complete: bool) -> None:
    """UsageError for refused lines, at the end or when too many to name, and at the end without tokens."""
    fatal = [problem for problem in totals.problems if problem.fatal]
    skipped = totals.counts["skipped"]
    count = sum(skipped[reason] for reason in {problem.reason for problem in fatal})
    if fatal and (complete or count > _NAMED_LINES):
        raise UsageError(_describe(fatal, count, totals.counts["totals"]["lines"], complete))
    if complete and not totals.counts["totals"]["tokens"]:
        names = ", ".join(str(source.path) for source in found)
        reasons = "; ".join(f"{number} {reason}" for reason, number in skipped.items()) or "no lines"
        raise UsageError(f"{names} holds no conversation to write ({reasons}); nothing was written")


def _describe(fatal: list[Problem], count: int, lines: int, complete: bool) -> str:
    first, *rest = _in_order(fatal)
    sentence = f"{first.path}, {first.unit} {first.line}: {first.sentence}"
    if count == 1:
        return f"{sentence}. Nothing was written"
    fields = (problem.reason.removeprefix(formats.UNUSED) for problem in rest)
    others = ", ".join(
        _where(problem) + (f" ({field})" if field != problem.reason else "")
        for problem, field in zip(rest[:_NAMED_LINES], fields, strict=False)
    )
    named = min(len(rest), _NAMED_LINES) + 1
    more = f" and {count - named} more" if count > named else ""
    of = f"{count} of {'' if complete else 'the first '}{lines} lines cannot be used"
    return f"{sentence}. {of}; others: {others}{more}. Nothing was written"


def _in_order(problems: list[Problem]) -> list[Problem]:
    """By line; files stay in the order in which they were read."""
    files = list(dict.fromkeys(problem.path for problem in problems))
    return sorted(problems, key=lambda problem: (files.index(problem.path), problem.line))


def _where(problem: Problem) -> str:
    return f"{Path(problem.path).name}:{problem.line}"


def manifest(job: Job, totals: Totals, files: list[FileState], parts: list[Part]) -> Manifest:
    """Return the manifest of a finished data set."""
    counts, numbers = totals.counts, totals.counts["totals"]
    capacity = job.options.capacity
    records = sum(part.records for part in parts)
    rendered, unused = counts["prompt_formats"], counts["unused_fields"]
    stored, digest = sum(part.tokens for part in parts), sha256(job.vocab_file)
    return {
        # texts begin with <_start>, as the plain format does
        "prompt_format": max(sorted(rendered), key=rendered.__getitem__) if rendered else "plain",
        "max_length": job.options.max_length,
        "seed": job.options.seed,
        "options": job.options._asdict(),
        "document_start_ids": job.vocabulary.start_ids,
        "documents_per_record": max(part.documents for part in parts),  # at most
        "inputs": [state._asdict() for state in files],
        "tokenizer": {"path": str(job.vocab_file), "sha256": digest, "vocab_size": job.vocabulary.size},
        "files": [{"name": part.name, "records": part.records} for part in parts],
        "counts": {
            "lines": numbers["lines"],
            "conversations": numbers["conversations"],
            "texts": numbers["texts"],
            "skipped": dict(sorted(counts["skipped"].items())),
            "skipped_lines": _examples(totals),
            "by_format": dict(sorted(counts["formats"].items())),
            "by_prompt_format": dict(sorted(rendered.items())),
            "copies_by_weight": numbers["copies"],
            "truncated": numbers["truncated"],
            "out_of_turn": numbers["out_of_turn"],
            "changed_text": numbers["changed_text"],
            "unused_fields": {
                name: unused[name] for name in sorted({*unused, *ignored_fields(job.options.ignore_fields)})
            },
            "with_special_text": numbers["with_special_text"],
            "records": records,
            "tokens": numbers["tokens"],
            "trained_tokens": numbers["trained_tokens"],
            "repeated_tokens": stored - numbers["tokens"],
            "padding_tokens": records * capacity - stored,
        },
        "lengths": {key: counts["lengths"][key] for key in sorted(counts["lengths"], key=int)},
    }


def _examples(totals: Totals) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in _in_order(totals.problems):
        told = problem.sentence and not problem.reason.startswith(TOO_LONG)
        found.setdefault(problem.reason, []).append(
            _where(problem) + (f": {problem.sentence}" if told else "")
        )
    return found
