"""Markdown documents of evaluations, as headings, paragraphs and tables of plain text.

Only the structure is read. Markup inside of a line stays text, since names in the tables come from data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

_RULE = re.compile(r"\s*:?-+:?\s*")
_CELL_END = re.compile(r"(?<!\\)\|")
_NUMERIC = re.compile(r"[-+$]?[\d.,]+( ?%)?([ /(\[+±].*)?|-|")


@dataclass(frozen=True)
class Table:
    """A table. `numeric` says which columns are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]


@dataclass(frozen=True)
class Block:
    """A part of a document. `kind` is `heading`, `text` or `table`, and only a table has one."""

    kind: str
    text: str = ""
    table: Table | None = None


def read_markdown(text: str) -> list[Block]:
    """Return the blocks of a document."""
    blocks = []
    for kind, group in groupby(text.splitlines(), key=_kind):
        lines = list(group)
        if kind == "table" and len(lines) > 1:
            blocks.append(Block("table", table=_table(lines)))
        elif kind == "heading":
            blocks += [Block("heading", line.lstrip("#").strip()) for line in lines]
        elif kind:
            blocks.append(Block("text", " ".join(line.strip() for line in lines)))
    return blocks


def _kind(line: str) -> str:
    if not line.strip():
        return ""
    if line.lstrip().startswith("|"):
        return "table"
    return "heading" if re.match(r"#{1,6} ", line) else "text"


def _table(lines: Sequence[str]) -> Table:
    rows = list(_rows(lines))
    width = len(rows[0])
    body = [[*row, *[""] * width][:width] for row in rows[1:]]
    numeric = [bool(body) and all(_NUMERIC.fullmatch(row[index]) for row in body) for index in range(width)]
    return Table(rows[0], body, numeric)


def _rows(lines: Sequence[str]) -> Iterator[list[str]]:
    for line in lines:
        inner = line.strip().removeprefix("|")
        cells = _CELL_END.split(inner)
        if cells[-1].strip() == "":
            cells.pop()
        if not all(_RULE.fullmatch(cell) for cell in cells):
            yield [cell.strip().replace(r"\|", "|") for cell in cells]
