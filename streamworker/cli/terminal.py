"""Tables on a terminal, drawn by rich; and ``--watch``: a listing again and again, below what needs attention."""

from __future__ import annotations

import asyncio
import sys
import termios
import time
import tty
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NoReturn

import anyio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import TypeVar

from streamworker.cli.options import Listing
from streamworker.cli.streams import say
from streamworker.cli.tables import GAP, ROWS, UNBOUNDED, Column, Rows, cells, take
from streamworker.errors import Unreachable
from streamworker.redact import printable
from streamworker.views.fleet import Fleet, Look, Notice, Point
from streamworker.views.rows import age

R = TypeVar("R")

NOTICES: Final = 3
"""Lines about what needs attention, at most."""
_COLORS: Final = {"bad": "bold red", "warn": "yellow", "note": "cyan"}


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # Rich's own would end the process with 1.
        raise BrokenPipeError


def console() -> Console:
    """Standard output, for rich."""
    made = _Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = UNBOUNDED
    return made


def table(
    rows: Sequence[tuple[R, bytes | None]], columns: Sequence[Column[R]], width: int, *, payload: bool = False
) -> Table:
    """A table that is ``width`` columns wide at most."""
    shown, texts = cells(rows, columns, width, payload=payload)
    made = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for column in shown:
        made.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.fold,
            overflow="fold" if column.fold else "ellipsis",
        )
    for line in texts:
        made.add_row(*map(Text, line))
    return made


async def watch(listing: Listing, rows: Rows[R], columns: Sequence[Column[R]], title: str, fleet: Fleet | None) -> int:
    """Show a listing until ``q`` or Ctrl-C; a server that is away for a while is said, and waited for.

    Where standard output is no terminal, or one that cannot be redrawn, each picture is printed below the last.
    """
    out = console()
    redrawn = _is_redrawn(out)
    if not redrawn:
        what = "this terminal cannot be redrawn" if out.is_terminal else "standard output is no terminal"
        say(f"{what}: the pictures follow each other; Ctrl-C ends")
    async with _key("q") as ended:
        with (
            Live(console=out, screen=True, auto_refresh=False, vertical_overflow="crop")
            if redrawn
            else _Plain(out) as live
        ):
            while not ended.is_set():
                live.update(await _picture(listing, rows, columns, title, fleet), refresh=True)
                with anyio.move_on_after(listing.interval):
                    await ended.wait()
    return 0


def _is_redrawn(out: Console) -> bool:
    """Whether rich's `Live` shows anything there: on a terminal that knows no controls (TERM=dumb) it does not."""
    return out.is_terminal and not out.is_dumb_terminal


class _Plain:
    """`Live` for what cannot be redrawn."""

    def __init__(self, out: Any) -> None:
        self._out = out

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, picture: Group, *, refresh: bool) -> None:
        """Print it."""
        del refresh
        self._out.print(picture)
        self._out.file.flush()


async def _picture(
    listing: Listing, rows: Rows[R], columns: Sequence[Column[R]], title: str, fleet: Fleet | None
) -> Group:
    out = console()
    head: list[Text] = [
        _line(f"{title}, {time.strftime('%H:%M:%S')}, every {listing.interval:g} s, q or Ctrl-C ends", "dim")
    ]
    try:
        if fleet is not None:
            look = await fleet.look()
            head += _summary(look)
        height = max(1, out.height - len(head) - 3) if _is_redrawn(out) else ROWS
        chosen, more = await take(rows(), min(listing.limit or height, height))
        body: Any = table(chosen, columns, out.width) if chosen else Text(f"no {title}")
        foot = Text("... and more" if more else "", "dim")
    except Unreachable as error:
        body, foot = Text(printable(str(error)), "red"), Text("")
    return Group(*head, body, foot)


def _summary(look: Look) -> list[Text]:
    lines = [_line(_totals(look.total, sum(worker.alive for worker in look.workers)), "bold")]
    shown = look.notices[:NOTICES]
    lines += [_notice(notice) for notice in shown]
    if len(look.notices) > len(shown):
        lines.append(_line(f"  and {len(look.notices) - len(shown)} more to look at", "dim"))
    return [*lines, Text("")]


def _totals(total: Point, workers: int) -> str:
    rate = "" if total.rate is None else f" · {total.rate:,.1f}/s"
    oldest = f" · oldest {age(total.oldest)}" if total.oldest is not None else ""
    counts = f"{total.ready:,} ready · {total.running:,} running · {total.delayed:,} delayed · {total.dead:,} dead"
    return f"{counts}{rate}{oldest} · {workers} worker{'' if workers == 1 else 's'}"


def _notice(notice: Notice) -> Text:
    return _line(f"! {printable(notice.sentence)}", _COLORS[notice.severity])


def _line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


@asynccontextmanager
async def _key(letter: str) -> AsyncIterator[anyio.Event]:
    """An event that is set when the key is pressed; the terminal's mode is restored afterwards."""
    pressed = anyio.Event()
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (OSError, ValueError, termios.error):  # no terminal to press keys on
        yield pressed
        return
    loop = asyncio.get_running_loop()

    def read() -> None:
        typed = ""
        with suppress(OSError):
            typed = sys.stdin.buffer.raw.read(64).decode(errors="replace")  # type: ignore[union-attr]
        if letter in typed.lower() or not typed:
            pressed.set()
            loop.remove_reader(number)

    tty.setcbreak(number)
    loop.add_reader(number, read)
    try:
        yield pressed
    finally:
        loop.remove_reader(number)
        termios.tcsetattr(number, termios.TCSADRAIN, before)
