"""Rows of text as a table of columns, and the beginning of a long list."""

from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which each column is as wide as its widest cell; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def listed(items: Iterable[object], most: int = 10) -> str:
    """The first ``most`` items with commas between, and how many more there are; unprintable ones escaped."""
    texts = [text if text.isprintable() else ascii(text) for text in map(str, items)]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
