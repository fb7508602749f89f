"""Markdown tables that are readable on a terminal, from texts that nobody vouches for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def markdown_table(header: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return a Markdown table whose columns are padded to equal width.

    Args:
        header: Titles of the columns.
        rows: Cells of each row after the first one, which contains the key.
    """
    lines = [list(header), *([title, *cells] for title, cells in rows.items())]
    lines = [[_cell(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def printable(text: str) -> str:
    """Return a text without characters that control a terminal or end a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _cell(text: str) -> str:
    """Replace characters that would break the table or control a terminal, because names come from data."""
    return printable(text).replace("|", "?")
