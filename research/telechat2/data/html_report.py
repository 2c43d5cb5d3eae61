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
from research.telechat2.data.report_words import word
from research.telechat2.data.spool import Spool, starts_of
from research.telechat2.text.vocabulary import TokenArray, Vocabulary

# Counts of the manifest that are told where they are not 0.
_TOLD = {
    "copies_by_weight": "further copies, by the weights of the files",
    "truncated": "cut at a turn border to fit a record",
    "out_of_turn": "conversations whose turns do not alternate",
    "changed_text": "with text that the vocabulary changes for good",
    "with_special_text": "with special-token text (such as <_end>), encoded as text",
}
_Say = Callable[[str], str]  # English -> the page's language
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
        *(f"  {counts[name]:,} {words}" for name, words in _TOLD.items() if counts[name]),
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


def write(path: Path, manifest: Manifest, spool: Spool, words: Vocabulary, language: str) -> None:
    """Write the page for a finished data set; the samples are drawn from its spool."""
    samples = list(islice(_samples(spool, [entry["path"] for entry in manifest["inputs"]]), SAMPLES))
    with atomic_write(path) as temporary:
        temporary.write_text(page(manifest, samples, words, language), encoding="utf-8")


def page(manifest: Manifest, samples: list[Sample], words: Vocabulary, language: str = "en") -> str:
    """Return the page in a language (``report_words.LANGUAGES``)."""

    def say(english: str) -> str:
        return word(english, language)

    counts = manifest["counts"]
    inputs = [[f["path"], f["bytes"], f["weight"], f["sha256"][:12]] for f in manifest["inputs"]]
    skipped = [
        [
            say(reason),
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
        "Result": _table("", [[say(name), value] for name, value in _result(manifest)], say),
        "Inputs": _table("file bytes weight sha256", inputs, say),
        "Formats": _bars(counts["by_format"]),
        "Skipped lines": _table("reason lines share first", skipped, say),
        "Fields that are not used": _table("field lines", list(counts["unused_fields"].items()), say),
        "Tokens in the records": _bars({say(name): n for name, n in stored.items()}, trained=say("trained")),
        "Lengths": f"<p>{say('Conversations and texts, by tokens, up to')}</p>{_bars(manifest['lengths'])}",
        "Samples": f"<p>{say('Trained tokens are')} <mark>{say('green')}</mark>, "
        f"{say('special ones')} <b>{say('violet')}</b>.</p>",
    }
    return "\n".join(
        [
            f"<!doctype html><html lang={language}><meta charset=utf-8><title>{say('Training data')}</title>"
            f"<style>{_STYLE}</style>",
            f"<h1>{say('Training data')}</h1>",
            *(f"<h2>{say(heading)}</h2>{content}" for heading, content in sections.items()),
            *(_sample(sample, words, say) for sample in samples),
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
        *((words, counts[name]) for name, words in _TOLD.items() if counts[name]),
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


def _sample(sample: Sample, words: Vocabulary, say: _Say) -> str:
    tokens = sample.tokens
    shown = tokens[:_SAMPLE_TOKENS]
    parts = []
    for span in words.spans((shown & ~TRAINED).tolist(), (shown >= TRAINED).tolist()):
        text = f"<b>{escape(span.text)}</b>" if span.special else escape(span.text)
        parts.append(f"<mark>{text}</mark>" if span.trained else text)
    trained = int((tokens >= TRAINED).sum())
    more = f" … {len(tokens) - len(shown):,} {say('tokens more')}" if len(tokens) > len(shown) else ""
    return (
        f"<p>{escape(sample.file)}:{sample.line}: {len(tokens):,} {say('tokens')}, {trained:,} "
        f"{say('trained')}</p><pre>{''.join(parts)}{more}</pre>"
    )


def _table(heads: str, rows: Sequence[Sequence[object]], say: _Say) -> str:
    """A table of columns that single words head; "none" without rows."""
    if not rows:
        return say("none")
    head = "".join(f"<th>{say(name)}</th>" for name in heads.split())
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
