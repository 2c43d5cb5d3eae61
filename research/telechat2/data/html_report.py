"""The page that ``--report`` writes: counts, lengths, masks, and samples as the model sees them."""

from html import escape
from itertools import islice
from pathlib import Path

import numpy as np

from research.telechat2.data.encoding import TRAINED
from research.telechat2.data.report import summary
from research.telechat2.data.spool import Spool, starts_of
from research.telechat2.data.vocabulary import Vocabulary
from research.telechat2.telechat_files import atomic_write

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


def write(path: Path, manifest: dict, spool: Spool, words: Vocabulary) -> None:
    """Write the page for a finished data set; the samples are drawn from its spool."""
    samples = list(islice(_samples(spool), SAMPLES))
    with atomic_write(path) as temporary:
        temporary.write_text(page(manifest, samples, words), encoding="utf-8")


def page(manifest: dict, samples: list[np.ndarray], words: Vocabulary) -> str:
    """Return the page; ``samples`` are the tokens of items, uint32 (see encoding)."""
    counts = manifest["counts"]
    inputs = [[f["path"], f["bytes"], f["weight"], f["sha256"][:12]] for f in manifest["inputs"]]
    said = summary({"output": manifest["files"][0]["name"], **manifest})
    skipped = [
        [reason, number, "; ".join(counts["skipped_lines"][reason][:3])]
        for reason, number in counts["skipped"].items()
    ]
    stored = {
        "trained": counts["trained_tokens"],
        "not trained": counts["tokens"] - counts["trained_tokens"],
        "repeated at splits": counts["repeated_tokens"],
        "padding": counts["padding_tokens"],
    }
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>Training data</title>"
            f"<style>{_STYLE}</style>",
            f"<h1>Training data</h1><pre>{escape(said)}</pre>",
            "<h2>Inputs</h2>" + _table(["file", "bytes", "weight", "sha256"], inputs),
            "<h2>Formats</h2>" + _bars(counts["by_format"]),
            "<h2>Skipped lines</h2>" + (_table(["reason", "lines", "first"], skipped) if skipped else "none"),
            "<h2>Tokens in the records</h2>" + _bars(stored, trained="trained"),
            "<h2>Lengths</h2><p>Conversations and texts, by tokens, up to</p>" + _bars(manifest["lengths"]),
            "<h2>Samples</h2><p>Trained tokens are <mark>green</mark>, special ones <b>violet</b>.</p>",
            *(_sample(tokens, words) for tokens in samples),
            "</html>\n",
        ]
    )


def _samples(spool: Spool):
    """Some items of the first bucket, which holds them at random."""
    for tokens, lengths in islice(spool.windows(0), 1):
        starts = starts_of(lengths)
        for i in np.random.default_rng(0).permutation(len(lengths)).tolist():
            yield tokens[starts[i] : starts[i + 1]]


def _sample(tokens: np.ndarray, words: Vocabulary) -> str:
    shown = tokens[:_SAMPLE_TOKENS]
    parts = []
    for span in words.spans((shown & ~TRAINED).tolist(), (shown >= TRAINED).tolist()):
        text = f"<b>{escape(span.text)}</b>" if span.special else escape(span.text)
        parts.append(f"<mark>{text}</mark>" if span.trained else text)
    trained = int((tokens >= TRAINED).sum())
    more = f" … {len(tokens) - len(shown):,} tokens more" if len(tokens) > len(shown) else ""
    return f"<p>{len(tokens):,} tokens, {trained:,} trained</p><pre>{''.join(parts)}{more}</pre>"


def _table(heads: list[str], rows: list[list]) -> str:
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
