"""Rows to people (tables) and to programs (JSON Lines): data on standard output, everything else on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import orjson
from typing_extensions import TypeVar

from streamworker.cli import streams
from streamworker.cli.options import Listing
from streamworker.cli.streams import say
from streamworker.cli.tables import ROWS, Column, Rows, plain_table, take
from streamworker.errors import UsageError
from streamworker.redact import clean_json, printable
from streamworker.views.fleet import Fleet
from streamworker.views.rows import document_facts

__all__ = ["Column", "document", "json_line", "plain", "print_json", "print_lines", "show"]

R = TypeVar("R")


def plain(row: Any) -> dict[str, Any]:
    """A row as a dictionary, in the order of its fields; ``progress`` is there only if the handler reported any."""
    if isinstance(row, Mapping):
        return dict(row)
    fields = {
        name: msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else value
        for name, value in msgspec.structs.asdict(row).items()
    }
    if "progress" in fields and (progress := fields.pop("progress")) is not None:
        fields["progress"] = progress  # behind the others, as it was
    return fields


def json_line(value: Any) -> str:
    """One line of JSON."""
    return clean_json(orjson.dumps(value, default=str).decode()) + "\n"


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    streams.write(json_line(value))


def print_lines(lines: Sequence[tuple[str, Any]]) -> None:
    """Names and values below each other; what is empty is left out."""
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        if value not in (None, ""):
            streams.write(f"{name:<{width}}  {printable(str(value))}\n")


def document(body: bytes | None) -> Any:
    """A JSON text to be put into a line of JSON, numbers kept as they are written; other bytes as text."""
    if body is None:
        return None
    try:
        return orjson.Fragment(msgspec.json.format(body, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="backslashreplace")


async def show(
    listing: Listing,
    rows: Rows[R],
    columns: Sequence[Column[R]],
    *,
    title: str,
    payload: bool = False,
    json: Callable[[R], dict[str, Any]] = plain,
    fleet: Fleet | None = None,
) -> int:
    """Print a listing as it is wanted.

    Args:
        listing: how.
        rows: where from.
        columns: of the table.
        title: what is listed, in the plural.
        payload: print the documents too.
        json: row to what is printed as JSON.
        fleet: the summary above a listing that is watched.

    Raises:
        UsageError: JSON cannot be watched.
    """
    if listing.watch:
        if listing.json:
            raise UsageError("--watch shows a table: leave out --json, or call again and again without --watch")
        from streamworker.cli.terminal import watch  # noqa: PLC0415 - it imports rich

        with streams.writing():
            return await watch(listing, rows, columns, title, fleet)
    if listing.json:
        count = 0
        async for row, body in rows():
            print_json(json(row) | ({"document": document(body)} if payload else {}))
            count += 1
            if count == listing.limit:
                break
        return 0
    chosen, more = await take(rows(), listing.limit or ROWS)
    if not chosen:
        say(f"no {title}")
        return 0
    _print_table(chosen, columns, payload=payload)
    if more:
        say(f"there are more {title}: --limit shows more, --json shows all")
    return 0


def _print_table(rows: Sequence[tuple[R, bytes | None]], columns: Sequence[Column[R]], *, payload: bool) -> None:
    if not sys.stdout.isatty() and not _TERMINAL.intersection(os.environ):
        text = plain_table(rows, columns, payload=payload)
        if text is not None:
            streams.write(text)
            return
    from streamworker.cli.terminal import console, table  # noqa: PLC0415 - it imports rich

    out = console()
    with streams.writing():
        out.print(table(rows, columns, out.width, payload=payload))


_TERMINAL: Final = {"FORCE_COLOR", "TTY_COMPATIBLE"}
"""Variables by which rich takes a pipe for a terminal."""


def detail(row: Any, body: bytes | None, *, payload: bool, json: bool, more: dict[str, Any] | None = None) -> None:
    """Print one job.

    Args:
        row: what its listing shows.
        body: its document.
        payload: print the document too.
        json: for programs.
        more: further facts.
    """
    facts = plain(row) | (more or {}) | document_facts(body)
    if json:
        print_json(facts | ({"document": document(body)} if payload else {}))
        return
    lines = list(facts.items())
    if payload and body is not None:
        lines.append(("document", body.decode(errors="backslashreplace")))
    print_lines(lines)
