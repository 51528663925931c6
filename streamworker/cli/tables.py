"""Tables of rows as text. `streamworker.cli.terminal` draws them on a terminal, with rich; a pipe needs no rich."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Generic, NamedTuple, TypeAlias

from typing_extensions import TypeVar

from streamworker.redact import printable

R = TypeVar("R")

ROWS: Final = 50
"""Rows of a table unless --limit says otherwise."""
WIDE: Final = 150
"""Columns of a terminal on which nothing is left out."""
UNBOUNDED: Final = 10_000
"""Columns of what is no terminal: nothing is cut off."""
GAP: Final = 2
"""Spaces between two columns."""

Rows: TypeAlias = Callable[[], AsyncIterator[tuple[R, bytes | None]]]
"""Starts reading rows anew; each with its document, if documents are wanted."""


class Column(NamedTuple, Generic[R]):
    """A column of a table.

    Attributes:
        title: its head.
        cell: row to text.
        right: numbers stand on the right.
        wide: left out on a narrow terminal.
        short: how long its text may be on a narrow terminal; the middle is left out.
        fold: continues in the next line where it is too long, instead of being cut off.
        rest: is cut to the width that the others leave.
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


def cells(
    rows: Sequence[tuple[R, bytes | None]], columns: Sequence[Column[R]], width: int, *, payload: bool = False
) -> tuple[list[Column[R]], list[list[str]]]:
    """(the columns that are shown, the texts of each row, the document last if it is wanted)."""
    wide = width >= WIDE
    shown = [column for column in columns if wide or not column.wide]
    texts = [[printable(column.cell(row)) for column in shown] for row, _ in rows]
    if not wide:
        texts = [[_short(text, column.short) for text, column in zip(line, shown, strict=True)] for line in texts]
    _cut_rest(texts, shown, width)
    if payload:
        shown.append(Column("document", lambda _: "", fold=True))
        for line, (_, body) in zip(texts, rows, strict=True):
            line.append(printable((body or b"").decode(errors="backslashreplace")))
    return shown, texts


def plain_table(
    rows: Sequence[tuple[R, bytes | None]], columns: Sequence[Column[R]], *, payload: bool = False
) -> str | None:
    """The table for a pipe or a file, as rich would print it; ``None`` if it is wider than `UNBOUNDED`."""
    shown, texts = cells(rows, columns, UNBOUNDED, payload=payload)
    lines = [[column.title for column in shown], *texts]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    widths[-1] = max(1, widths[-1])  # as rich has it
    if sum(widths) + GAP * len(widths) > UNBOUNDED:
        return None
    printed = []
    for line in lines:
        padded = []
        for text, column, width in zip(line, shown, widths, strict=True):
            shown_text = text.rstrip() if column.right else text
            spaces = " " * (width - _width(shown_text))
            padded.append(spaces + shown_text if column.right else shown_text + spaces)
        printed.append((" " * GAP).join(padded) + "\n")
    return "".join(printed)


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 - most tables are ASCII, and rich takes a while to import

    return cell_len(text)


def _cut_rest(texts: Sequence[list[str]], columns: Sequence[Column[R]], width: int) -> None:
    others = sum(
        2 + max([len(column.title), *(len(line[at]) for line in texts)])
        for at, column in enumerate(columns)
        if not column.rest
    )
    left = max(10, width - others - 2)
    for at in (at for at, column in enumerate(columns) if column.rest):
        for line in texts:
            if len(line[at]) > left:
                line[at] = f"{line[at][: left - 1]}…"


def _short(text: str, most: int) -> str:
    """The text with its middle left out: ids differ at their ends."""
    if not most or len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"
