"""``streamworker history``: how many runs there were, and how long they took, by queue and kind."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from streamworker.cli.options import LISTING, WORKER, Listing, QueueName, WorkerFlags, run
from streamworker.cli.output import Column, plain, print_json, print_lines, show
from streamworker.cli.streams import say
from streamworker.settings import EMBEDDED, Settings
from streamworker.telemetry.run_history import HistoryReader
from streamworker.views.history import (
    BLOCKS,
    PLAIN_BLOCKS,
    HistoryKind,
    HistoryLook,
    duration,
    look_back,
    percent,
    sparkline,
)

Range = Annotated[Literal["1h", "24h", "7d", "60d"], Parameter(name="--range")]


def history(
    *,
    queue: QueueName = None,
    kind: str | None = None,
    range_: Range = "24h",
    listing: Listing = LISTING,
    flags: WorkerFlags = WORKER,
) -> int:
    """Show the history of runs: how many were done, how long they ran and waited, beside the week before.

    Args:
        queue: Only of this queue.
        kind: Only of this kind; --json prints each step of it, too.
        range_: How far back: 1h, 24h, 7d or 60d.
    """
    settings = flags.settings()

    async def main() -> int:
        async with AsyncExitStack() as stack:
            reader = await _reader(stack, settings)
            looks: list[HistoryLook] = []

            async def rows() -> AsyncIterator[tuple[HistoryKind, None]]:
                look = looks.pop() if looks else await look_back(reader, range_, queue=queue, kind=kind)
                for row in [look.total, *look.kinds] if len(look.kinds) > 1 and not listing.json else look.kinds:
                    yield row, None

            if not listing.watch:
                looks.append(await look_back(reader, range_, queue=queue, kind=kind))
                _above(looks[0], settings, listing)
            return await show(listing, rows, _columns(_blocks()), title="runs in this time", json=_json)

    return run(main, endless=listing.watch)


async def _reader(stack: AsyncExitStack, settings: Settings) -> HistoryReader:
    """The ledger's history if there is a ledger, else that in Redis."""
    from streamworker.operators import LedgerKeys, open_operator, open_servers  # noqa: PLC0415 - it imports redis

    url = settings.database_url
    if url is None and settings.redis_url == EMBEDDED:
        _, url = await open_servers(stack, settings, None)
    archive = await LedgerKeys(stack, settings, url).archive()
    if archive is not None:
        return archive.history
    return (await stack.enter_async_context(open_operator(settings))).history


def _blocks() -> str:
    """Letters of sparklines that this terminal has."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_BLOCKS
    return PLAIN_BLOCKS if os.environ.get("TERM") == "dumb" else BLOCKS


def _columns(blocks: str) -> list[Column[HistoryKind]]:
    def name(row: HistoryKind) -> str:
        return row.kind if row.queue else "(all)"

    def time(field: str) -> Any:
        return lambda row: duration(getattr(row, field))

    return [
        Column("kind", name, short=24),
        Column("queue", lambda row: row.queue, short=14),
        Column("done", lambda row: f"{row.done:,}", right=True),
        Column("", lambda row: sparkline(row.shape, blocks, 30)),
        Column("failed", lambda row: f"{row.failed:,}", right=True),
        Column("retried", lambda row: f"{row.retried:,}", right=True, wide=True),
        Column("started", lambda row: f"{row.started:,}", right=True, wide=True),
        Column("week", lambda row: percent(row.change), right=True),
        Column("run p50", time("run_p50_s"), right=True, wide=True),
        Column("run p95", time("run_p95_s"), right=True),
        Column("p99", time("run_p99_s"), right=True, wide=True),
        Column("wait p50", time("wait_p50_s"), right=True, wide=True),
        Column("wait p95", time("wait_p95_s"), right=True),
        Column("p99", time("wait_p99_s"), right=True, wide=True),
    ]


def _above(look: HistoryLook, settings: Settings, listing: Listing) -> None:
    """What stands before the table: the course of all runs; in JSON the steps of one kind."""
    if not look.total.started and settings.history == "off":
        say("STREAMWORKER_HISTORY is off: workers with this setting keep no history")
    if listing.json:
        if look.kind is not None:
            for point in look.points:
                print_json({"step": plain(point)})
        return
    if not look.total.started:
        return
    blocks, points = _blocks(), look.drawn
    before = look.before if any(point.started for point in look.before) else []
    drawn: list[tuple[str, list[float | None], str]] = [
        ("done", [point.done_per_s for point in points], "{:,.4g}/s"),
        (
            "a week before",
            [point.done_per_s for point in before] if any(p.started for p in before) else [],
            "{:,.4g}/s",
        ),
        ("failed", [point.failed_per_s for point in points], "{:,.4g}/s"),
        ("run p95", [point.run_p95_s for point in points], ""),
        ("wait p95", [point.wait_p95_s for point in points], ""),
    ]
    lines = []
    for name, values, form in drawn:
        if values:
            top = max(value or 0.0 for value in values)
            lines.append((name, f"{sparkline(values, blocks)}  at most {form.format(top) if form else duration(top)}"))
    print_lines([("", f"{look.range.words}, {points[0].at} to now"), *lines])


def _json(row: HistoryKind) -> dict[str, Any]:
    return plain(row)
