"""Tables of rows: what fits a terminal is shown, what does not is cut where it hurts least."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Generic, NamedTuple, NoReturn, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import TypeVar

from streamworker.views import printable

R = TypeVar("R")

ROWS: Final = 50
"""Rows of a table unless --limit says otherwise."""
WIDE: Final = 150
"""Columns of a terminal that has room for everything."""

Rows: TypeAlias = Callable[[], AsyncIterator[tuple[R, bytes | None]]]
"""Starts reading rows anew; each with its document, if documents are wanted."""


class Column(NamedTuple, Generic[R]):
    """A column of a table.

    Attributes:
        title: its head.
        cell: row to text.
        right: numbers stand on the right.
        wide: left out where there is no room.
        short: how long its text may be where there is no room; the middle is left out.
        fold: goes on in the next line where there is no room, instead of being cut off.
        rest: is cut to the room that the others leave.
    """

    title: str
    cell: Callable[[R], str]
    right: bool = False
    wide: bool = False
    short: int = 0
    fold: bool = False
    rest: bool = False


async def take(rows: AsyncIterator[tuple[R, bytes | None]], limit: int) -> tuple[list[tuple[R, bytes | None]], bool]:
    """(the first rows, whether there are more)."""
    chosen: list[tuple[R, bytes | None]] = []
    async for pair in rows:
        if len(chosen) == limit:
            return chosen, True
        chosen.append(pair)
    return chosen, False


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # Rich's own would end the process with 1.
        raise BrokenPipeError


def console() -> Console:
    """Standard output."""
    made = _Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = 10_000  # nobody's window: nothing is cut off
    return made


def table(
    rows: Sequence[tuple[R, bytes | None]], columns: Sequence[Column[R]], width: int, *, payload: bool = False
) -> Table:
    """A table that is ``width`` columns wide at most."""
    wide = width >= WIDE
    shown = [column for column in columns if wide or not column.wide]
    texts = [[printable(column.cell(row)) for column in shown] for row, _ in rows]
    if not wide:
        texts = [[_short(text, column.short) for text, column in zip(line, shown, strict=True)] for line in texts]
    _cut_rest(texts, shown, width)
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in shown:
        made.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.fold,
            overflow="fold" if column.fold else "ellipsis",
        )
    if payload:
        made.add_column("document", overflow="fold")
    for line, (_, body) in zip(texts, rows, strict=True):
        document_ = [printable((body or b"").decode(errors="backslashreplace"))] if payload else []
        made.add_row(*map(Text, [*line, *document_]))
    return made


def _cut_rest(texts: Sequence[list[str]], columns: Sequence[Column[R]], width: int) -> None:
    others = sum(
        2 + max([len(column.title), *(len(line[at]) for line in texts)])
        for at, column in enumerate(columns)
        if not column.rest
    )
    room = max(10, width - others - 2)
    for at in (at for at, column in enumerate(columns) if column.rest):
        for line in texts:
            if len(line[at]) > room:
                line[at] = f"{line[at][: room - 1]}…"


def _short(text: str, most: int) -> str:
    """The text with its middle left out: ids differ at their ends."""
    if not most or len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"
