"""The page that ``--report`` writes: counts, lengths, masks, and samples as the model sees them."""

from collections.abc import Callable, Iterator
from html import escape
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from research.telechat2.common.files import atomic_write
from research.telechat2.data.encoding import TRAINED, place_of
from research.telechat2.data.report_words import word
from research.telechat2.data.spool import Spool, starts_of
from research.telechat2.text.vocabulary import Vocabulary

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


def summary(result: dict) -> str:
    """Return what ``prepare`` did, in lines for a reader."""
    counts = result["counts"]
    skipped = counts["skipped"]
    share = f" ({sum(skipped.values()) / counts['lines']:.2%})" if skipped else ""
    total = counts["records"] * (result["max_length"] + 1)
    texts = f"+ {counts['texts']:,} texts " if counts["texts"] else ""
    lines = [
        f"read {counts['lines']:,} lines = {counts['conversations']:,} conversations {texts}written "
        f"+ {sum(skipped.values()):,} skipped{share}"
    ]
    first = {reason: where[0] for reason, where in counts["skipped_lines"].items()}
    lines += [f"  skipped {n:,}: {reason} (first: {first[reason]})" for reason, n in skipped.items()]
    formats = ", ".join(f"{count:,} {name}" for name, count in counts["by_format"].items())
    lines.append(f"  formats: {formats}")
    if counts["copies_by_weight"]:
        lines.append(f"  {counts['copies_by_weight']:,} further copies, by the weights of the files")
    if counts["truncated"]:
        lines.append(f"  {counts['truncated']:,} cut at a turn border to fit a record")
    if counts["unused_fields"]:
        fields = ", ".join(f"{count:,} {name}" for name, count in counts["unused_fields"].items())
        lines.append(f"  fields that are not used (metadata, or named in --ignore_fields): {fields}")
    if counts["out_of_turn"]:
        lines.append(f"  {counts['out_of_turn']:,} conversations whose turns do not alternate")
    if counts["changed_text"]:
        lines.append(f"  {counts['changed_text']:,} hold text that the vocabulary changes for good")
    if len(counts["by_prompt_format"]) > 1:
        both = " and ".join(f"{count:,} {name}" for name, count in counts["by_prompt_format"].items())
        lines.append(f"  mixed prompt formats: {both}; recorded as {result['prompt_format']}")
    if counts["with_special_text"]:
        lines.append(
            f"  {counts['with_special_text']:,} contain special-token text (such as <_end>), encoded as text"
        )
    files = f", {len(result['files'])} files" if len(result["files"]) > 1 else ""
    lines += [
        f"wrote {counts['records']:,} records of {result['max_length'] + 1:,} tokens to {result['output']}"
        + files,
        f"  prompt format {result['prompt_format']}, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens']:,} of them trained, padding {counts['padding_tokens'] / total:.2%}",
    ]
    return "\n".join(lines)


class Sample(NamedTuple):
    """An item of the data set: its tokens, uint32 (see encoding), and where it was read."""

    tokens: np.ndarray
    file: str
    line: int


def write(path: Path, manifest: dict, spool: Spool, words: Vocabulary, language: str) -> None:
    """Write the page for a finished data set; the samples are drawn from its spool."""
    samples = list(islice(_samples(spool, [entry["path"] for entry in manifest["inputs"]]), SAMPLES))
    with atomic_write(path) as temporary:
        temporary.write_text(page(manifest, samples, words, language), encoding="utf-8")


def page(manifest: dict, samples: list[Sample], words: Vocabulary, language: str = "en") -> str:
    """Return the page in a language (``report_words.LANGUAGES``)."""

    def say(english: str) -> str:
        return word(english, language)

    def heading(english: str) -> str:
        return f"<h2>{say(english)}</h2>"

    counts = manifest["counts"]
    inputs = [[f["path"], f["bytes"], f["weight"], f["sha256"][:12]] for f in manifest["inputs"]]
    lines = counts["lines"]
    skipped = [
        [say(reason), number, f"{number / lines:.2%}", "; ".join(counts["skipped_lines"][reason][:3])]
        for reason, number in counts["skipped"].items()
    ]
    stored = {
        "trained": counts["trained_tokens"],
        "not trained": counts["tokens"] - counts["trained_tokens"],
        "repeated at splits": counts["repeated_tokens"],
        "padding": counts["padding_tokens"],
    }
    unused = [[name, number] for name, number in counts["unused_fields"].items()]
    return "\n".join(
        [
            f"<!doctype html><html lang={language}><meta charset=utf-8><title>{say('Training data')}</title>"
            f"<style>{_STYLE}</style>",
            f"<h1>{say('Training data')}</h1>",
            heading("Result") + _table([], [[say(name), value] for name, value in _result(manifest)]),
            heading("Inputs") + _table(list(map(say, ("file", "bytes", "weight", "sha256"))), inputs),
            heading("Formats") + _bars(counts["by_format"]),
            heading("Skipped lines")
            + (_table(list(map(say, ("reason", "lines", "share", "first"))), skipped) or say("none")),
            heading("Fields that are not used")
            + (_table(list(map(say, ("field", "lines"))), unused) or say("none")),
            heading("Tokens in the records")
            + _bars({say(name): number for name, number in stored.items()}, trained=say("trained")),
            heading("Lengths")
            + f"<p>{say('Conversations and texts, by tokens, up to')}</p>"
            + _bars(manifest["lengths"]),
            heading("Samples") + f"<p>{say('Trained tokens are')} <mark>{say('green')}</mark>, "
            f"{say('special ones')} <b>{say('violet')}</b>.</p>",
            *(_sample(sample, words, say) for sample in samples),
            "</html>\n",
        ]
    )


def _result(manifest: dict) -> list[tuple[str, object]]:
    """Name and value of what a run did; what did not happen is left out."""
    counts = manifest["counts"]
    skipped, size = sum(counts["skipped"].values()), manifest["max_length"] + 1
    texts = {
        "texts": counts["texts"],
        "further copies, by the weights of the files": counts["copies_by_weight"],
        "cut at a turn border to fit a record": counts["truncated"],
        "turns do not alternate": counts["out_of_turn"],
        "text that the vocabulary changes": counts["changed_text"],
        "special-token text (such as <_end>), encoded as text": counts["with_special_text"],
    }
    padding = counts["padding_tokens"] / (counts["records"] * size)
    prompt_formats = counts["by_prompt_format"]
    mixed = ", ".join(f"{number:,} {name}" for name, number in prompt_formats.items())
    return [
        ("lines read", counts["lines"]),
        ("lines skipped", f"{skipped:,} ({skipped / counts['lines']:.2%})"),
        ("conversations", counts["conversations"]),
        *((name, number) for name, number in texts.items() if number),
        ("records", counts["records"]),
        ("tokens of a record", size),
        ("tokens", counts["tokens"]),
        ("padding", f"{padding:.2%}"),
        ("prompt format", manifest["prompt_format"] + (f" ({mixed})" if len(prompt_formats) > 1 else "")),
    ]


def _samples(spool: Spool, files: list[str]) -> Iterator[Sample]:
    """Some items of the first bucket, which holds them at random."""
    for tokens, lengths, places in islice(spool.windows(0), 1):
        starts = starts_of(lengths)
        for i in np.random.default_rng(0).permutation(len(lengths)).tolist():
            file, line = place_of(int(places[i]))
            yield Sample(tokens[starts[i] : starts[i + 1]], Path(files[file]).name, line)


def _sample(sample: Sample, words: Vocabulary, say: Callable[[str], str]) -> str:
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


def _table(heads: list[str], rows: list[list]) -> str:
    """A table, "" without rows."""
    if not rows:
        return ""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{body}</table>"


def _cell(value) -> str:
    is_number = isinstance(value, (int, float))
    return f"<td{' class=number' if is_number else ''}>{f'{value:,}' if is_number else escape(value)}</td>"


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
