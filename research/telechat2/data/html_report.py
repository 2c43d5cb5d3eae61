"""The page that ``--report`` writes: counts, lengths, masks, and samples as the model sees them."""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from research.telechat2.common.files import atomic_write
from research.telechat2.data.encoding import TRAINED, place_of
from research.telechat2.data.manifests import Manifest
from research.telechat2.data.report_words import in_language
from research.telechat2.data.spool import Spool, starts_of
from research.telechat2.text.vocabulary import TokenArray, Vocabulary

# Counts of the manifest that summary and page give where they are not 0.
_FURTHER_COUNTS = {
    "copies_by_weight": "further copies, by the weights of the files",
    "truncated": "cut at a turn border to fit a record",
    "out_of_turn": "conversations whose turns do not alternate",
    "changed_text": "with text that the vocabulary changes for good",
    "with_special_text": "with special-token text (such as <_end>), encoded as text",
}
_Translate = Callable[[str], str]  # English -> the page's language
SAMPLES = 12
_SAMPLE_TOKENS = 1500  # so much of a sample is shown
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: left; vertical-align: top }
td.number { text-align: right }
.bar { background: #7aa6d8; height: .9em } .bar.trained { background: #58a866 }
pre { background: #f6f6f6; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: #c8ecc9; color: #123 } b { color: #8a4fb0; font-weight: 600 }
"""


def summary(result: Manifest) -> str:
    """Return what ``prepare`` did, in lines for a reader."""
    counts, skipped = result["counts"], result["counts"]["skipped"]
    share = f" ({sum(skipped.values()) / counts['lines']:.2%})" if skipped else ""
    texts = f"+ {counts['texts']:,} texts " if counts["texts"] else ""
    first = {reason: where[0] for reason, where in counts["skipped_lines"].items()}
    lines = [
        f"read {counts['lines']:,} lines = {counts['conversations']:,} conversations {texts}written "
        f"+ {sum(skipped.values()):,} skipped{share}",
        *(f"  skipped {n:,}: {reason} (first: {first[reason]})" for reason, n in skipped.items()),
        f"  formats: {_listed(counts['by_format'])}",
        *(f"  {counts[name]:,} {words}" for name, words in _FURTHER_COUNTS.items() if counts[name]),
    ]
    if counts["unused_fields"]:
        fields = _listed(counts["unused_fields"])
        lines.append(f"  fields that are not used (metadata, or named in --ignore_fields): {fields}")
    if len(counts["by_prompt_format"]) > 1:
        mixed = _listed(counts["by_prompt_format"])
        lines.append(f"  mixed prompt formats: {mixed}; recorded as {result['prompt_format']}")
    files = f", {len(result['files'])} files" if len(result["files"]) > 1 else ""
    return "\n".join(
        [
            *lines,
            f"wrote {counts['records']:,} records of {result['max_length'] + 1:,} tokens to "
            f"{result['output']}{files}",
            f"  prompt format {result['prompt_format']}, {counts['tokens']:,} tokens, "
            f"{counts['trained_tokens']:,} of them trained, padding {_padding(result)}",
        ]
    )


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in numbers.items())


def _padding(manifest: Manifest) -> str:
    counts = manifest["counts"]
    return f"{counts['padding_tokens'] / (counts['records'] * (manifest['max_length'] + 1)):.2%}"


class Sample(NamedTuple):
    """An item of the data set: its tokens, uint32 (see encoding), and where it was read."""

    tokens: TokenArray
    file: str
    line: int


def write(path: Path, manifest: Manifest, spool: Spool, vocabulary: Vocabulary, language: str) -> None:
    """Write the page for a finished data set; the samples are drawn from its spool."""
    samples = list(islice(_samples(spool, [entry["path"] for entry in manifest["inputs"]]), SAMPLES))
    with atomic_write(path) as temporary:
        temporary.write_text(page(manifest, samples, vocabulary, language), encoding="utf-8")


def page(manifest: Manifest, samples: list[Sample], vocabulary: Vocabulary, language: str = "en") -> str:
    """Return the page in a language (``report_words.LANGUAGES``)."""

    def tr(english: str) -> str:
        return in_language(english, language)

    counts = manifest["counts"]
    inputs = [[f["path"], f["bytes"], f["weight"], f["sha256"][:12]] for f in manifest["inputs"]]
    skipped = [
        [
            tr(reason),
            number,
            f"{number / counts['lines']:.2%}",
            "; ".join(counts["skipped_lines"][reason][:3]),
        ]
        for reason, number in counts["skipped"].items()
    ]
    stored = {
        "trained": counts["trained_tokens"],
        "not trained": counts["tokens"] - counts["trained_tokens"],
        "repeated at splits": counts["repeated_tokens"],
        "padding": counts["padding_tokens"],
    }
    sections = {
        "Result": _table("", [[tr(name), value] for name, value in _result(manifest)], tr),
        "Inputs": _table("file bytes weight sha256", inputs, tr),
        "Formats": _bars(counts["by_format"]),
        "Skipped lines": _table("reason lines share first", skipped, tr),
        "Fields that are not used": _table("field lines", list(counts["unused_fields"].items()), tr),
        "Tokens in the records": _bars({tr(name): n for name, n in stored.items()}, trained=tr("trained")),
        "Lengths": f"<p>{tr('Conversations and texts, by tokens, up to')}</p>{_bars(manifest['lengths'])}",
        "Samples": f"<p>{tr('Trained tokens are')} <mark>{tr('green')}</mark>, "
        f"{tr('special ones')} <b>{tr('violet')}</b>.</p>",
    }
    return "\n".join(
        [
            f"<!doctype html><html lang={language}><meta charset=utf-8><title>{tr('Training data')}</title>"
            f"<style>{_STYLE}</style>",
            f"<h1>{tr('Training data')}</h1>",
            *(f"<h2>{tr(heading)}</h2>{content}" for heading, content in sections.items()),
            *(_sample(sample, vocabulary, tr) for sample in samples),
            "</html>\n",
        ]
    )


def _result(manifest: Manifest) -> list[tuple[str, object]]:
    """Name and value of what a run did; what did not happen is left out."""
    counts = manifest["counts"]
    skipped = sum(counts["skipped"].values())
    rendered = counts["by_prompt_format"]
    mixed = f" ({_listed(rendered)})" if len(rendered) > 1 else ""
    return [
        ("lines read", counts["lines"]),
        ("lines skipped", f"{skipped:,} ({skipped / counts['lines']:.2%})"),
        ("conversations", counts["conversations"]),
        *([("texts", counts["texts"])] if counts["texts"] else []),
        *((words, counts[name]) for name, words in _FURTHER_COUNTS.items() if counts[name]),
        ("records", counts["records"]),
        ("tokens of a record", manifest["max_length"] + 1),
        ("tokens", counts["tokens"]),
        ("padding", _padding(manifest)),
        ("prompt format", f"{manifest['prompt_format']}{mixed}"),
    ]


def _samples(spool: Spool, files: list[str]) -> Iterator[Sample]:
    """Some items of the first bucket, which holds them at random."""
    for tokens, lengths, places in islice(spool.windows(0), 1):
        starts = starts_of(lengths)
        for i in np.random.default_rng(0).permutation(len(lengths)).tolist():
            file, line = place_of(int(places[i]))
            yield Sample(tokens[starts[i] : starts[i + 1]], Path(files[file]).name, line)


def _sample(sample: Sample, vocabulary: Vocabulary, tr: _Translate) -> str:
    tokens = sample.tokens
    shown = tokens[:_SAMPLE_TOKENS]
    parts = []
    for span in vocabulary.spans((shown & ~TRAINED).tolist(), (shown >= TRAINED).tolist()):
        text = f"<b>{escape(span.text)}</b>" if span.special else escape(span.text)
        parts.append(f"<mark>{text}</mark>" if span.trained else text)
    trained = int((tokens >= TRAINED).sum())
    more = f" … {len(tokens) - len(shown):,} {tr('tokens more')}" if len(tokens) > len(shown) else ""
    return (
        f"<p>{escape(sample.file)}:{sample.line}: {len(tokens):,} {tr('tokens')}, {trained:,} "
        f"{tr('trained')}</p><pre>{''.join(parts)}{more}</pre>"
    )


def _table(heads: str, rows: Sequence[Sequence[object]], tr: _Translate) -> str:
    """A table of columns that single words head; "none" without rows."""
    if not rows:
        return tr("none")
    head = "".join(f"<th>{tr(name)}</th>" for name in heads.split())
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f"<td class=number>{value:,}</td>"
    return f"<td>{escape(str(value))}</td>"


def _bars(numbers: dict[str, int], trained: str = "") -> str:
    """A horizontal bar chart."""
    total, largest = sum(numbers.values()), max(numbers.values(), default=0)
    rows = "".join(
        f"<tr>{_cell(name)}{_cell(number)}<td class=number>{number / total:.1%}</td><td style='width:30em'>"
        f"<div class='bar{' trained' if name == trained else ''}' "
        f"style='width:{100 * number / largest:.1f}%'></div></td></tr>"
        for name, number in numbers.items()
        if number
    )
    return f"<table>{rows}</table>"
