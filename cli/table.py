"""Plain columns, and the few styles that a terminal may add.

No borders, two spaces between columns, no wrapping: a row is a line, so that
`grep`, `awk` and a golden file read the same thing as a person does. Styles
are dropped by click when the output is not a terminal or NO_COLOR is set.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import click

from meshbpf.cli.escape import printable

GAP = "  "
EMPTY = "-"  # what a cell shows when there is nothing to show


class Style(Enum):
    """What a cell means; the colour follows."""

    PLAIN = None
    GOOD = "green"
    WARN = "yellow"
    BAD = "red"


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with a style; `right` aligns numbers by their last digit."""

    text: str
    style: Style = Style.PLAIN
    right: bool = False


CellLike: TypeAlias = Cell | str | int | None


def good_if(fact: bool, text: str) -> Cell:
    """`text`, in green when `fact` holds and in red when not."""
    return Cell(text, Style.GOOD if fact else Style.BAD)


def table(headers: Sequence[str], rows: Iterable[Sequence[CellLike]]) -> str:
    """Headers and rows as aligned lines; only the header when there is no row."""
    body = [[_cell(value) for value in row] for row in rows]
    columns = [[Cell(name), *cells] for name, *cells in zip(headers, *body, strict=True)]
    widths = [max(_width(cell.text) for cell in column) for column in columns]
    # One number makes a column of numbers: its title and its gaps stand right as well.
    right = [any(cell.right for cell in column) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join(_line(cells, widths, right) for cells in lines)


def facts(pairs: Iterable[tuple[str, CellLike]]) -> str:
    """`name:  value` lines with the values in one column."""
    found = [(f"{name}:", _cell(value)) for name, value in pairs]
    widths = [max((_width(name) for name, _ in found), default=0), 0]
    return "\n".join(_line([Cell(name), value], widths, [False, False]) for name, value in found)


def line(text: str) -> str:
    """One sentence that may name things of others."""
    return printable(text)


def _cell(value: CellLike) -> Cell:
    if value is None or value == "":
        return Cell(EMPTY)
    if isinstance(value, int):
        return Cell(str(value), right=True)
    if isinstance(value, str):
        return Cell(printable(value))
    return Cell(printable(value.text) or EMPTY, value.style, value.right)


def _line(cells: Sequence[Cell], widths: Sequence[int], right: Sequence[bool]) -> str:
    parts = []
    for cell, width, at_right in zip(cells, widths, right, strict=True):
        pad = " " * (width - _width(cell.text))
        text = cell.text
        if cell.style is not Style.PLAIN:
            text = click.style(text, fg=cell.style.value)
        parts.append(pad + text if at_right else text + pad)
    return GAP.join(parts).rstrip()


def _width(text: str) -> int:
    """Terminal columns: wide East Asian characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
