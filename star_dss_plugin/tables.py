"""Print tables that fit the terminal without breaking words, with numbers right-aligned.

If the columns do not fit side by side, the rest follow in a second table below, with the first
columns repeated, so that nothing is truncated. Output to a file or a pipe has no drawn lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from star_dss_plugin.visible import visible

__all__ = ["Sheet", "terminal"]

_GAP = 2
_NARROWEST = 8
"""Width to which a column of words may shrink if even single words do not fit."""
_NUMBER = re.compile(r"[+−-]?\d[\d,]*(?:\.\d+)?(?: ?[%B])?(?:[ \n][±\[(+−-].*)?|-?", re.DOTALL)
_LINED = Box("    \n    \n ── \n    \n    \n ── \n    \n    \n")
_PLAIN = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)


def terminal(*, stderr: bool = False) -> Console:
    """Return a console that prints text unchanged, without colours, links or markup."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


@dataclass(frozen=True)
class Sheet:
    """Hold a table of text for `terminal().print`.

    Attributes:
        headings: One heading per column.
        rows: The cells of each row; a line feed begins another line. Any text is safe.
        title: A line above the table; empty: none.
        keys: How many of the first columns identify a row. They are repeated in each table if the
            columns do not fit side by side.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    keys: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        box = _LINED if console.is_terminal else _PLAIN
        cells = [[visible(cell) for cell in row] for row in self.rows]
        columns = [
            _Column(visible(heading), tuple(row[i] for row in cells))
            for i, heading in enumerate(self.headings)
        ]
        if self.title:
            yield Text(visible(self.title), style="bold")
        for number, group in enumerate(_groups(columns, self.keys, options.max_width)):
            if number:
                yield Text()
            yield _table(group, options.max_width, box)


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: tuple[str, ...]

    @property
    def numbers(self) -> bool:
        return any(self.cells) and all(_NUMBER.fullmatch(cell) for cell in self.cells)

    @property
    def natural(self) -> int:
        """Return the smallest width at which nothing is wrapped."""
        return max(map(cell_len, _split((self.heading, *self.cells), "\n")))

    @property
    def least(self) -> int:
        """Return the smallest width that breaks no word, or no number with its unit or interval."""
        by = "\n" if self.numbers else None
        found = [*_split((self.heading,), None), *_split(self.cells, by)]
        return max(map(cell_len, found), default=1)


def _split(texts: Iterable[str], by: str | None) -> Iterator[str]:
    for text in texts:
        yield from text.split(by) or ("",)


def _groups(columns: Sequence[_Column], keys: int, width: int) -> Iterator[list[_Column]]:
    """Split columns into tables that fit the width, each beginning with the key columns."""
    first, rest = list(columns[:keys]), list(columns[keys:])
    group = first[:]
    for column in rest:
        if len(group) > len(first) and _room([c.least for c in (*group, column)]) > width:
            yield group
            group = first[:]
        group.append(column)
    yield group


def _room(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """Distribute the width: first what whole words need, then to the columns that wrap most."""
    widths = [column.least for column in columns]
    while _room(widths) > width and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    while _room(widths) < width:
        missing = [c.natural - w for c, w in zip(columns, widths, strict=True)]
        if max(missing) <= 0:
            break
        widths[missing.index(max(missing))] += 1
    return widths


def _table(columns: Sequence[_Column], width: int, box: Box) -> Table:
    table = Table(
        box=box, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold"
    )
    for column, wide in zip(columns, _widths(columns, width), strict=True):
        table.add_column(
            Text(column.heading),
            width=wide,
            justify="right" if column.numbers else "left",
            overflow="fold",
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table
