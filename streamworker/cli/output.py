"""Rows to people (tables) and to programs (JSON Lines): data on standard output, everything else on standard error."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, NoReturn, TypeAlias

import anyio
import msgspec
import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import TypeVar

from streamworker.cli import say, stdout
from streamworker.cli.options import Listing
from streamworker.errors import StreamworkerError, Unreachable, UsageError
from streamworker.views import printable

R = TypeVar("R")

ROWS: Final = 50
"""Rows of a table unless --limit says otherwise."""
WIDE: Final = 150
"""Columns of a terminal that has room for everything."""
# JSON may hold them, but a terminal would obey them.
_UNPRINTABLE: Final = re.compile("[\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


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


def plain(row: Any) -> dict[str, Any]:
    """A row as a dictionary, in the order of its fields."""
    return dict(row) if isinstance(row, Mapping) else msgspec.structs.asdict(row)


def json_line(value: Any) -> str:
    """One line of JSON."""
    line = orjson.dumps(value, default=str).decode()
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", line) + "\n"


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    stdout.write(json_line(value))


def print_lines(lines: Sequence[tuple[str, Any]]) -> None:
    """Names and values below each other; what is empty is left out."""
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        if value not in (None, ""):
            stdout.write(f"{name:<{width}}  {printable(str(value))}\n")


def document(body: bytes | None) -> Any:
    """A JSON text to be put into a line of JSON, numbers kept as they are written; other bytes as text."""
    if body is None:
        return None
    try:
        return orjson.Fragment(msgspec.json.format(body, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="backslashreplace")


Rows: TypeAlias = Callable[[], AsyncIterator[tuple[R, bytes | None]]]
"""Starts reading rows anew; each with its document, if documents are wanted."""


async def show(
    listing: Listing,
    rows: Rows[R],
    columns: Sequence[Column[R]],
    *,
    title: str,
    payload: bool = False,
    json: Callable[[R], dict[str, Any]] = plain,
) -> int:
    """Print a listing as it is wanted.

    Args:
        listing: how.
        rows: where from.
        columns: of the table.
        title: what is listed, in the plural.
        payload: print the documents too.
        json: row to what is printed as JSON.

    Raises:
        UsageError: JSON cannot be watched.
    """
    if listing.watch:
        if listing.json:
            raise UsageError("--watch shows a table: leave out --json, or call again and again without --watch")
        with stdout.writing():
            return await _watch(listing, rows, columns, title)
    if listing.json:
        count = 0
        async for row, body in rows():
            print_json(json(row) | ({"document": document(body)} if payload else {}))
            count += 1
            if count == listing.limit:
                break
        return 0
    console = _console()
    chosen, more = await _take(rows(), listing.limit or ROWS)
    if not chosen:
        say(f"no {title}")
        return 0
    with stdout.writing():
        console.print(_table(chosen, columns, console.width, payload=payload))
    if more:
        say(f"there are more {title}: --limit shows more, --json shows all")
    return 0


async def _watch(listing: Listing, rows: Rows[R], columns: Sequence[Column[R]], title: str) -> int:
    """Look again and again; a server that is away for a while is said, and waited for."""
    console = _console()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            room = max(1, console.height - 5) if console.is_terminal else ROWS
            head = Text(f"{title}, {time.strftime('%H:%M:%S')}, every {listing.interval:g} s, Ctrl-C ends", "dim")
            try:
                chosen, more = await _take(rows(), min(listing.limit or room, room))
                body: Any = _table(chosen, columns, console.width) if chosen else Text(f"no {title}")
                foot = Text("... and more" if more else "", "dim")
            except Unreachable as error:
                body, foot = Text(printable(str(error)), "red"), Text("")
            live.update(Group(head, body, foot), refresh=True)
            await anyio.sleep(listing.interval)


async def _take(rows: AsyncIterator[tuple[R, bytes | None]], limit: int) -> tuple[list[tuple[R, bytes | None]], bool]:
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


def _console() -> Console:
    console = _Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000  # nobody's window: nothing is cut off
    return console


def _table(
    rows: Sequence[tuple[R, bytes | None]], columns: Sequence[Column[R]], width: int, *, payload: bool = False
) -> Table:
    wide = width >= WIDE
    shown = [column for column in columns if wide or not column.wide]
    texts = [[printable(column.cell(row)) for column in shown] for row, _ in rows]
    if not wide:
        texts = [[_short(text, column.short) for text, column in zip(line, shown, strict=True)] for line in texts]
    _cut_rest(texts, shown, width)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in shown:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.fold,
            overflow="fold" if column.fold else "ellipsis",
        )
    if payload:
        table.add_column("document", overflow="fold")
    for line, (_, body) in zip(texts, rows, strict=True):
        document_ = [printable((body or b"").decode(errors="backslashreplace"))] if payload else []
        table.add_row(*map(Text, [*line, *document_]))
    return table


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


def sentence_of(error: StreamworkerError) -> str:
    """What to say about one job that could not be changed; errors that concern all of them are raised again.

    Raises:
        StreamworkerError: the server is away, or a setting is wrong.
    """
    if error.exit_code != StreamworkerError.exit_code:
        raise error
    return str(error)
